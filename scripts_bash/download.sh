#!/usr/bin/env bash
# Download published files to the places where the configs look for them; --help names them all:
#   bash scripts_bash/download.sh tokenizer codes
set -euo pipefail
cd "$(dirname "$0")/.."
python scripts/download.py "$@"
