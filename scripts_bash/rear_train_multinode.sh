#!/usr/bin/env bash
# Train reAR on several machines; run it on each machine.
# Further arguments override the config:
#   NUM_NODES=4 NODE_RANK=0 MASTER_ADDR=node0 CONFIG=configs/rear_l.yaml bash scripts_bash/rear_train_multinode.sh
# NODE_RANK is 0 on the machine MASTER_ADDR, whose MASTER_PORT must be reachable. All machines see the same OUTPUT_DIR.
# LOCAL_ADDR: the address of this machine for the others, if they do not know its host name.
# Rerun the same command to resume. DRY_RUN=1 prints the command instead of running it.
set -euo pipefail
cd "$(dirname "$0")/.."

CONFIG=${CONFIG:-configs/rear_b.yaml}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/$(basename "$CONFIG" .yaml)}
NUM_NODES=${NUM_NODES:-${SLURM_NNODES:-1}}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
MASTER_PORT=${MASTER_PORT:-29500}
JOB_ID=${JOB_ID:-${SLURM_JOB_ID:-rear}}
TIMEOUT=${TIMEOUT:-300}
if ((NUM_NODES == 1)); then LOCAL_ADDR=127.0.0.1; fi

export PYTHONPATH="$PWD"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600} # seconds to save after SIGTERM, not 30
IS_HOST=false
if [[ "$NODE_RANK" == 0 ]]; then IS_HOST=true; fi
COMMAND=(torchrun --nnodes="$NUM_NODES" --nproc_per_node="$GPUS_PER_NODE" --max_restarts=0 --rdzv_id="$JOB_ID"
  --rdzv_backend=c10d --rdzv_endpoint="$MASTER_ADDR:$MASTER_PORT"
  --rdzv_conf="is_host=$IS_HOST,join_timeout=$TIMEOUT,last_call_timeout=5"
  ${LOCAL_ADDR:+--local_addr="$LOCAL_ADDR"} scripts/train_rear.py config="$CONFIG" experiment.output_dir="$OUTPUT_DIR" "$@")
if [[ "${DRY_RUN:-0}" == 1 ]]; then
  printf '%q ' "${COMMAND[@]}"
  echo
  exit
fi
exec "${COMMAND[@]}" # the signals of a batch system reach torchrun, which passes SIGTERM on to the workers
