#!/usr/bin/env bash
# Lint, format and the test suite. Arguments go to pytest: bash scripts_bash/test.sh -k config
set -euo pipefail
source "$(dirname "$0")/environment.sh"

ruff check .
ruff format --check .
python -m pytest -m "not slow" "$@"
