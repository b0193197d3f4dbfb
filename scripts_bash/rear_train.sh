#!/usr/bin/env bash
# Train reAR with the published recipe. Further arguments override the config:
#   CONFIG=configs/rear_l.yaml NUM_GPUS=4 bash scripts_bash/rear_train.sh training.gradient_accumulation_steps=2
# Rerun the same command to resume.
set -euo pipefail
cd "$(dirname "$0")/.."

CONFIG=${CONFIG:-configs/rear_b.yaml}
NUM_GPUS=${NUM_GPUS:-8}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/$(basename "$CONFIG" .yaml)}

export PYTHONPATH="$PWD"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600} # seconds to save after SIGTERM, not 30
# --standalone: on a free port. --local_addr: the name of this machine need not resolve.
exec torchrun --standalone --local_addr=127.0.0.1 --nproc_per_node="$NUM_GPUS" scripts/train_rear.py \
  config="$CONFIG" experiment.output_dir="$OUTPUT_DIR" "$@"
