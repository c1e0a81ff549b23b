#!/usr/bin/env bash
# Compiles the Triton kernels for a Hopper GPU with every version that a supported torch brings,
# from the environment `make test` sets up. Downloads about 1 GB.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

for version in ${*:-3.2.0 3.3.1 3.4.0 3.5.1 3.6.0}; do
    rm -rf "$folder/triton"
    python -m pip install --quiet --no-deps --upgrade --target "$folder/triton" "triton==$version"
    PYTHONPATH="$folder/triton" python tests/aot.py sm_90 all > "$folder/kernels.json"
    python - "$version" "$folder/kernels.json" <<'END'
import json
import sys

version, path = sys.argv[1:]
with open(path) as file:
    kernels = json.load(file)
assert all(k["float64"] == 0 and k["registers"] <= 128 for k in kernels)
plain = next(k for k in kernels if k["of"] == ["dynamic-clip", "bf16", 151936])
(read, _), (_, write) = plain["issued"]["read"], plain["issued"]["write"]
spilled = [k["of"] for k in kernels if k["spills"]]
print(f"triton {version}: {len(kernels)} kernels; fused dcpo issues {read + write:.1f} "
      f"instructions a bf16 logit; spills in a sweep: {spilled or 'none'}")
END
done
