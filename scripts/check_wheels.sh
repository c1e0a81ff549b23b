#!/usr/bin/env bash
# sdist and wheel, each installed in a clean environment and used from another folder; the same wheel under the oldest
# torch that is supported and under the one of constraints.txt. Takes some minutes and 5 GB of disk for a while.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
torch=$(sed -n 's/^torch==//p' "$root/constraints.txt")
oldest=2.6.0
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export PIP_QUIET=1 PIP_DISABLE_PIP_VERSION_CHECK=1

environment() { # name, then what pip installs
  "${PYTHON:-python3}" -m venv "$1"
  "$1/bin/python" -m pip install "${@:2}"
}
check() { "$1/bin/python" "$work/check_install.py"; }

cp "$root/scripts/check_install.py" .
environment builder build
echo "== building the sdist, and the wheel from it"
builder/bin/python -m build --outdir dist "$root" >build.log 2>&1 || { tail -40 build.log; exit 1; }
ls -l dist
wheel=$(echo dist/*.whl)

echo "== wheel, torch $torch"
environment wheel "torch==$torch" "$wheel"
check wheel
echo "== sdist, torch $torch"
environment sdist "torch==$torch" dist/*.tar.gz
check sdist

# PyPI has this torch only with CUDA, whose libraries are 2 GB that no CPU needs: empty ones stand in.
echo "== the same wheel, torch $oldest"
environment oldest --no-deps "torch==$oldest" "$wheel"
oldest/bin/python -m pip install numpy filelock typing-extensions networkx jinja2 fsspec \
  "sympy==1.13.1" "nvidia-cuda-runtime-cu12==12.4.127" 2>/dev/null
oldest/bin/python "$root/scripts/stand_in_for_cuda.py"
check oldest
