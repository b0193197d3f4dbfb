#!/usr/bin/env bash
# docs/own-images.md from end to end on the 1,797 handwritten digits that scikit-learn ships: tokenizer and model from
# scratch, samples, and a report. All outputs are in OUT; rerun the same command to resume.
#   OUT=outputs/digits bash scripts_bash/digits.sh --minutes 30
set -euo pipefail
source "$(dirname "$0")/environment.sh"

export OUT=${OUT:-outputs/digits}
python -c 'import sklearn' 2>/dev/null || python -m pip install --quiet --disable-pip-version-check scikit-learn
python scripts/example_images.py digits "$OUT/digits"
exec bash scripts_bash/own_images.sh "$OUT/digits" --no-flip "$@"
