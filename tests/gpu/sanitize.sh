#!/usr/bin/env bash
# The tests of kernels under NVIDIA's compute-sanitizer: memory errors, then races in shared memory. A few cases of each
# test, SOME_CASES of them (3), as every launch takes many times as long.
#   tests/gpu/sanitize.sh [pytest's options]      TOOLS=racecheck SOME_CASES=10 tests/gpu/sanitize.sh -k prefill
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null) ||
  { echo "tests/gpu/sanitize.sh: needs compute-sanitizer, of the CUDA toolkit" >&2; exit 2; }
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # each tensor is an allocation of its own, whose ends are watched
export SOME_CASES=${SOME_CASES:-3}
status=0
for tool in ${TOOLS:-memcheck racecheck}; do
  echo "== $tool"
  "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 5 "$python" -P -m pytest \
    tests/gpu/test_{activation,block_copy,norm,paged_attention,prefill_attention,rotary_write,sampling_kernels,skinny_linear,write_kv}.py \
    -m gpu --confcutdir=tests/gpu -p no:cacheprovider -q -x "$@" || status=1
done
[ $status = 0 ] && echo "sanitizer: clean" || echo "sanitizer: FOUND ERRORS"
exit $status
