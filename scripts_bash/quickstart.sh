#!/usr/bin/env bash
# All steps on real images, on a CPU or one GPU: tiles of NASA's Blue Marble -> tokens -> reAR training -> samples -> npz
# -> score. All inputs come with Python packages; all outputs are in OUT. Rerun the same command to resume. Arguments
# override the config of every step:
#   OUT=outputs/other_seed bash scripts_bash/quickstart.sh training.seed=1
set -euo pipefail
source "$(dirname "$0")/environment.sh"
source scripts_bash/run.sh

OUT=${OUT:-outputs/quickstart}
NUM_SAMPLES=${NUM_SAMPLES:-740} # the number of validation tiles
# On a CPU two processes share the work: operations as small as these gain little from threads.
PROCESSES=$(python -c 'import torch; print(1 if torch.cuda.is_available() else 2)')
CPUS=$(python -c 'import os; print(len(os.sched_getaffinity(0)))')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$CPUS} # total of all processes
LAUNCH=(env OMP_NUM_THREADS=$(((OMP_NUM_THREADS + PROCESSES - 1) / PROCESSES)) torchrun --standalone --local_addr=127.0.0.1 --nproc_per_node="$PROCESSES")
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} # threads that spin while they wait take the CPU from each other
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 # keep freed memory: scoring is faster

TOKENS=(dataset.params.pretokenization="$OUT/train.tokens")
TRAIN_TILES=(dataset.params.train_shards_path_or_url="$OUT/images/train-*.tar")
HELD_OUT_TILES=(dataset.params.eval_shards_path_or_url="$OUT/images/heldout-*.tar")
BATCH=(training.global_batch_size=32 training.per_gpu_batch_size=$((32 / PROCESSES)))
CONFIG=(config=configs/rear_blue_marble.yaml)
TRAIN=(scripts/train_rear.py "${CONFIG[@]}" "${TOKENS[@]}" "${TRAIN_TILES[@]}" "${HELD_OUT_TILES[@]}" "${BATCH[@]}" "$@")
SAMPLE=("${LAUNCH[@]}" scripts/sample_imagenet_rear.py "${CONFIG[@]}" "${TRAIN_TILES[@]}" "$@" sampling.num_fid_samples="$NUM_SAMPLES")
RECONSTRUCT=(python scripts/reconstruct.py "${CONFIG[@]}" "${HELD_OUT_TILES[@]}" "$@" sampling.num_fid_samples="$NUM_SAMPLES")

STARTED=() NAMES=()
step() { printf '\n== %s\n' "$*"; STARTED+=("$SECONDS"); NAMES+=("$*"); }

step "1/6 images: tiles of the Blue Marble in twelve regions"
run python scripts/build_blue_marble.py "$OUT/images"

step "2/6 tokens: the tokenizer on the training tiles, and its reconstructions of validation tiles"
[[ -d $OUT/train.tokens ]] || run "${LAUNCH[@]}" scripts/pretokenize.py "${CONFIG[@]}" "${TOKENS[@]}" "${TRAIN_TILES[@]}" \
  training.per_gpu_batch_size=$((32 / PROCESSES)) "$@"
run "${RECONSTRUCT[@]}" experiment.output_dir="$OUT/tokenizer"

step "3/6 training: reAR on the tokens (rerun the same command to resume)"
run "${LAUNCH[@]}" "${TRAIN[@]}" experiment.output_dir="$OUT/rear"
run python "${TRAIN[@]}" experiment.output_dir="$OUT/untrained" training.stop_steps=0

step "4/6 samples of the trained and of an untrained model"
run "${SAMPLE[@]}" experiment.output_dir="$OUT/samples" experiment.generator_checkpoint="$OUT/rear"
run "${SAMPLE[@]}" experiment.output_dir="$OUT/untrained_samples" experiment.generator_checkpoint="$OUT/untrained"

step "5/6 scores against the validation tiles; the score of training tiles is the attainable value"
run "${RECONSTRUCT[@]}" experiment.output_dir="$OUT/train_tiles" \
  dataset.params.eval_shards_path_or_url="$OUT/images/train-*.tar"
run "${LAUNCH[@]}" evaluation/evaluator.py "$OUT/tokenizer/reference.npz" --backend efficientnet_lite0 \
  "$OUT"/{samples,untrained_samples,tokenizer/reconstructions,train_tiles/reference}.npz

step "6/6 report"
run python scripts/quickstart_report.py "$OUT"
STARTED+=("$SECONDS")
printf '\nseconds per step:\n'
for i in "${!NAMES[@]}"; do printf '%6d  %s\n' $((STARTED[i + 1] - STARTED[i])) "${NAMES[i]}"; done
