#!/usr/bin/env bash
# Sample 50,000 images and score them. Further arguments override the config:
#   CHECKPOINT=reAR-B.safetensors REFERENCE=VIRTUAL_imagenet256_labeled.npz bash scripts_bash/rear_test.sh
# Without REFERENCE it only samples. Or check a published number, a row of configs/published_results.yaml or of the file ROWS:
#   ROW=rear_b bash scripts_bash/rear_test.sh
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts_bash/run.sh

ROW=${ROW:-}
NUM_GPUS=${NUM_GPUS:-8}
export PYTHONPATH="$PWD"

if [[ -n "$ROW" ]]; then
  if [[ -n "${CONFIG:-}${BACKEND:-}" ]]; then
    echo "error: ROW=$ROW sets config and backend; unset CONFIG and BACKEND" >&2
    exit 1
  fi
  CHECK=("$ROW" --rows "${ROWS:-configs/published_results.yaml}")
  CHECK+=(${CHECKPOINT:+--checkpoint "$CHECKPOINT"} ${REFERENCE:+--reference "$REFERENCE"})
  NEEDED=$(python scripts/check_row.py "${CHECK[@]}")
  { read -r BACKEND; read -r REFERENCE; mapfile -t ARGUMENTS; } <<<"$NEEDED"
  OUTPUT_DIR=${OUTPUT_DIR:-outputs/row_$ROW}
else
  CONFIG=${CONFIG:-configs/rear_b.yaml}
  NAME=$(basename "$CONFIG" .yaml)
  CHECKPOINT=${CHECKPOINT:-outputs/$NAME}
  OUTPUT_DIR=${OUTPUT_DIR:-outputs/${NAME}_samples}
  REFERENCE=${REFERENCE:-}
  BACKEND=${BACKEND:-inception}
  ARGUMENTS=(config="$CONFIG" experiment.generator_checkpoint="$CHECKPOINT")
fi

run torchrun --standalone --local_addr=127.0.0.1 --nproc_per_node="$NUM_GPUS" scripts/sample_imagenet_rear.py "${ARGUMENTS[@]}" \
  experiment.output_dir="$OUTPUT_DIR" "$@"

if [[ -n "$REFERENCE" ]]; then
  run torchrun --standalone --local_addr=127.0.0.1 --nproc_per_node="$NUM_GPUS" evaluation/evaluator.py "$REFERENCE" "$OUTPUT_DIR.npz" --backend "$BACKEND"
  echo "The original evaluator reads the same file (docs/evaluation.md): python evaluator.py $REFERENCE $OUTPUT_DIR.npz"
fi

if [[ -n "$ROW" ]]; then
  run python scripts/check_row.py "${CHECK[@]}" --samples "$OUTPUT_DIR.npz"
fi
