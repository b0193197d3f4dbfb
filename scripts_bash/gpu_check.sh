#!/usr/bin/env bash
# Check a new GPU in ten minutes: parity, precision, training, speed. Writes a table to OUT:
#   bash scripts_bash/gpu_check.sh [OUT] [--parts NAME ...]
# OUT is outputs/gpu_check without an argument. The exit status is 1 if anything failed.
set -euo pipefail
cd "$(dirname "$0")/.."
exec python scripts/gpu_check.py "$@"
