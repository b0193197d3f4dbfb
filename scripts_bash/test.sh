#!/usr/bin/env bash
# Lint, format and the test suite. Arguments go to pytest: bash scripts_bash/test.sh -k config
set -euo pipefail
source "$(dirname "$0")/environment.sh"

export OMP_NUM_THREADS=1 # as torchrun sets it: runs are compared bit for bit, and a number of threads rounds its own way
ruff check .
ruff format --check .
python -m pytest -m "not slow" "$@"
