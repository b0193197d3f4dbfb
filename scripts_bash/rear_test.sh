#!/usr/bin/env bash
# Sample 50,000 images and score them. Further arguments override the config:
#   CHECKPOINT=reAR-B.safetensors REFERENCE=VIRTUAL_imagenet256_labeled.npz bash scripts_bash/rear_test.sh
# Without REFERENCE it samples only.
set -euo pipefail
cd "$(dirname "$0")/.."

CONFIG=${CONFIG:-configs/rear_b.yaml}
NUM_GPUS=${NUM_GPUS:-8}
NAME=$(basename "$CONFIG" .yaml)
CHECKPOINT=${CHECKPOINT:-outputs/$NAME}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/${NAME}_samples}
REFERENCE=${REFERENCE:-}
BACKEND=${BACKEND:-inception}

export PYTHONPATH="$PWD"
torchrun --standalone --nproc_per_node="$NUM_GPUS" scripts/sample_imagenet_rear.py config="$CONFIG" \
  experiment.output_dir="$OUTPUT_DIR" experiment.generator_checkpoint="$CHECKPOINT" "$@"

if [[ -n "$REFERENCE" ]]; then
  torchrun --standalone --nproc_per_node="$NUM_GPUS" evaluation/evaluator.py "$REFERENCE" "$OUTPUT_DIR.npz" --backend "$BACKEND"
  echo "The original evaluator reads the same file (docs/evaluation.md): python evaluator.py $REFERENCE $OUTPUT_DIR.npz"
fi
