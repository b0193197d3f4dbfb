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
if ((NUM_GPUS > 1)); then # without GPUs: processes on the CPU
  PORT=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])') # free: 29500 may be another run's
  LAUNCH=(accelerate launch --config_file scripts_bash/accelerate.yaml --num_machines 1 --num_processes "$NUM_GPUS"
    --main_process_port "$PORT" --mixed_precision no --dynamo_backend no --multi_gpu)
else
  LAUNCH=(python) # a single process of accelerate would not get SIGTERM
fi
exec "${LAUNCH[@]}" scripts/train_rear.py config="$CONFIG" experiment.output_dir="$OUTPUT_DIR" "$@"
