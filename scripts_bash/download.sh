#!/usr/bin/env bash
# Download published files to the paths in the configs; --help lists them:
#   bash scripts_bash/download.sh tokenizer codes
set -euo pipefail
cd "$(dirname "$0")/.."
exec python scripts/download.py "$@"
