#!/usr/bin/env bash
# A study on Fashion-MNIST, all steps: images, tokens, reconstructions as the reference, and the cells of a plan
# (docs/results.md). Rerun the same command to resume. Arguments go to scripts/study.py; without any, no cell runs:
#   bash scripts_bash/fashion_study.sh config=configs/studies/rear.yaml workers=2
# FASHION_MNIST: folder of the four IDX files, if they are not where scripts/fashion_mnist.py looks for them.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
source scripts_bash/run.sh

export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} # on a CPU: waiting threads sleep
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 # keep freed memory: scoring is faster
OUT=outputs/fashion # the folder that the configs name
CONFIG=(config=configs/rear_fashion.yaml)
TRAIN_IMAGES=$OUT/images/train-*.tar HELDOUT_IMAGES=$OUT/images/heldout-*.tar

run python scripts/fashion_mnist.py "$OUT/images" ${FASHION_MNIST:+--source "$FASHION_MNIST"}
[[ -d $OUT/train.tokens ]] || run python scripts/pretokenize.py "${CONFIG[@]}"
[[ -d $OUT/heldout.tokens ]] || run python scripts/pretokenize.py "${CONFIG[@]}" \
  dataset.params.train_shards_path_or_url="$HELDOUT_IMAGES" dataset.params.pretokenization="$OUT/heldout.tokens"
run python scripts/reconstruct.py "${CONFIG[@]}" experiment.output_dir="$OUT/reconstructions" \
  dataset.params.eval_shards_path_or_url="$TRAIN_IMAGES"
if (($# > 0)); then run python scripts/study.py "$@"; fi
