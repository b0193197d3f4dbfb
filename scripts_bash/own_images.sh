#!/usr/bin/env bash
# From a folder of images, with a sub-folder per class, to samples and a report page (docs/own-images.md):
#   bash scripts_bash/own_images.sh FOLDER [--minutes 30] [--resolution 32] [--tokens 64] [--no-flip]
# All outputs are in OUT (default: outputs/<name of the folder>). Rerun the same command to resume. The options are those
# of scripts/make_config.py.
set -euo pipefail
if [[ $# == 0 || $1 == -* ]]; then
  echo "usage: bash scripts_bash/own_images.sh FOLDER [--minutes 30] [--resolution 32] [--tokens 64] [--no-flip]" >&2
  exit 2
fi
FOLDER=$(realpath -m -- "$1")
shift
OUT=$(realpath -m -- "${OUT:-$(dirname "$0")/../outputs/$(basename -- "$FOLDER")}")
source "$(dirname "$0")/environment.sh"
source scripts_bash/run.sh
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} # threads that spin while they wait take the CPU from each other
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 # keep freed memory: scoring is faster

ARGUMENTS="$FOLDER $*"
if [[ -f $OUT/arguments.txt && $(cat "$OUT/arguments.txt") != "$ARGUMENTS" ]]; then
  echo "error: $OUT: made with '$(cat "$OUT/arguments.txt")', not '$ARGUMENTS'; choose another OUT or delete it" >&2
  exit 2
fi
step() { printf '\n== %s (%d minutes so far)\n' "$*" $((SECONDS / 60)); }
CONFIG=(config="$OUT/rear.yaml")

step "1/7 shards: a tenth of each class is held out"
[[ -f $OUT/images/shards.json ]] || run python scripts/make_shards.py "$FOLDER" "$OUT/images" --heldout 0.1
[[ -f $OUT/arguments.txt ]] || printf '%s\n' "$ARGUMENTS" > "$OUT/arguments.txt"
step "2/7 config: sizes and steps for these images and this machine"
if [[ ! -f $OUT/configs.complete ]]; then # the configs are written before and after steps are measured
  run python scripts/make_config.py "$OUT/images" "$OUT" "$@"
  touch "$OUT/configs.complete"
fi
step "3/7 tokenizer"
run python scripts/train_tokenizer.py config="$OUT/tokenizer.yaml"
step "4/7 tokens"
run python scripts/pretokenize.py "${CONFIG[@]}"
step "5/7 generator"
run python scripts/train_rear.py "${CONFIG[@]}"
step "6/7 samples and scores"
run python scripts/sample_imagenet_rear.py "${CONFIG[@]}" experiment.output_dir="$OUT/samples" \
  experiment.generator_checkpoint="$OUT/rear"
run python scripts/reconstruct.py "${CONFIG[@]}" experiment.output_dir="$OUT/heldout"
heldout=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["images"])' "$OUT/heldout/reconstruct.json")
if ((heldout >= 4)); then # the evaluator refuses fewer; the report says so
  run python evaluation/evaluator.py "$OUT/heldout/reference.npz" "$OUT/samples.npz" "$OUT/heldout/reconstructions.npz" \
    --backend efficientnet_lite0
fi
step "7/7 report"
run python scripts/own_images_report.py "$OUT"
