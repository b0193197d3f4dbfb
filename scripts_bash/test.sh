#!/usr/bin/env bash
# Lint, format, types and the test suite, in two processes. Arguments go to pytest: bash scripts_bash/test.sh -k config
# (-n 0: in one process, for a debugger).
set -euo pipefail
source "$(dirname "$0")/environment.sh"

export OMP_NUM_THREADS=1 # as torchrun sets it: runs are compared bit for bit, and a number of threads rounds its own way
ruff check .
ruff format --check .
mypy
# Each process begins with a half of the files in the order of their names, and takes tests from the other at its end.
python -m pytest -m "not slow" -n 2 --dist worksteal "$@"
