#!/usr/bin/env bash
# Runs the tests that need a GPU, where torch, pytest and nvcc are but this package is not installed.
# Packages in a folder of their own are found when PYTHONPATH names it.
#   tests/gpu/run.sh [pytest's options]      PYTHON=python3.12 tests/gpu/run.sh -k attention
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
if ! "$python" -P -c 'import pytest, torch'; then
  echo "tests/gpu/run.sh: $python needs torch and pytest; name a folder that holds them in PYTHONPATH" >&2
  exit 2
fi
# -P and confcutdir: nothing of the repository's root is imported by its bare name, nor any conftest of other tests.
exec "$python" -P -m pytest tests/gpu -m gpu --confcutdir=tests/gpu -p no:cacheprovider -q --durations=5 "$@"
