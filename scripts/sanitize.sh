#!/usr/bin/env bash
# The CUDA kernels under each tool of compute-sanitizer, on small rows that end oddly (tests/test_gpu.py).
set -u
cd "$(dirname "$0")/.."
tool=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
[ -x "$tool" ] || { echo "compute-sanitizer is not installed: nothing was sanitized"; exit 0; }
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # a read beyond a tensor is then one beyond what was allocated
only=()
[[ $("$tool" --help) != *--kernel-regex* ]] || only=(--kernel-regex kernel_substring=dcpo)

failed=
for name in memcheck racecheck synccheck initcheck; do
  echo "== $name"
  timeout 60 "$tool" --tool "$name" --error-exitcode 9 "${only[@]}" \
    "${PYTHON:-python3}" -m pytest -q -m gpu -k odd_rows tests/test_gpu.py || failed+=" $name($?)"
done
[ -z "$failed" ] || { echo "failed, or not done after 60 s (124):$failed"; exit 1; }
