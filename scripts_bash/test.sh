#!/usr/bin/env bash
# Lint, format, types and the test suite, in two processes. Arguments go to pytest: bash scripts_bash/test.sh -k config
# (-n 0: in one process, for a debugger).
set -euo pipefail
source "$(dirname "$0")/environment.sh"

# For the tests of the demo page, which are skipped where these cannot be had: gradio, which does not fit the oldest
# versions (pip tries for many minutes), and Debian's Chromium, which root alone installs.
if [[ -n ${CONSTRAINTS:-} ]]; then
  echo "requirements-demo.txt is not installed: gradio does not fit $CONSTRAINTS"
elif ! python -m pip show -q gradio 2> /dev/null; then
  python -m pip install --quiet --disable-pip-version-check -r requirements-demo.txt ||
    echo "requirements-demo.txt is not installed"
fi
if [[ $EUID == 0 ]] && command -v apt-get > /dev/null && ! command -v chromedriver > /dev/null; then
  echo "installing Chromium"
  { apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver; } &> /dev/null ||
    echo "Chromium is not installed"
fi

export OMP_NUM_THREADS=1 # as torchrun sets it: runs are compared bit for bit, and a number of threads rounds its own way
ruff check .
ruff format --check .
mypy
# Each process begins with a half of the files in the order of their names, and takes tests from the other at its end.
python -m pytest -m "not slow" -n 2 --dist worksteal "$@"
