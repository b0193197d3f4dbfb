#!/usr/bin/env bash
# Lint, format, types and the test suite, in two processes. Arguments go to pytest:
#   bash scripts_bash/test.sh -k config     (-n 0: in one process, for a debugger)
#   bash scripts_bash/test.sh -m slow       the slow tests; installs gradio and, as root, Debian's Chromium and SLURM
set -euo pipefail
source "$(dirname "$0")/environment.sh"

if [[ " $* " == *" -m slow "* ]]; then
  # gradio does not fit the oldest versions, and pip would search for many minutes.
  if [[ -n ${CONSTRAINTS:-} ]]; then
    echo "requirements-demo.txt is not installed: gradio does not fit $CONSTRAINTS"
  else
    python -m pip install --quiet --disable-pip-version-check -r requirements-demo.txt
  fi
  if [[ $EUID == 0 ]] && command -v apt-get > /dev/null && ! command -v chromedriver > /dev/null; then
    echo "installing Chromium for the tests of the demo page"
    { apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver; } > /dev/null
  fi
fi

export OMP_NUM_THREADS=1 # as torchrun sets it: runs are compared bit for bit, and the number of threads changes rounding
ruff check .
ruff format --check .
mypy
# Each process starts with half of the files in alphabetical order and steals tests from the other when it runs out.
exec python -m pytest -m "not slow" -n 2 --dist worksteal "$@"
