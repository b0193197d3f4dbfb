#!/usr/bin/env bash
# docs/own-images.md from end to end on the 1,797 handwritten digits that scikit-learn ships: tokenizer and model from
# scratch, samples, and their distance to validation digits. All outputs are in OUT; rerun the same command to resume.
#   OUT=outputs/digits bash scripts_bash/digits.sh
set -euo pipefail
source "$(dirname "$0")/environment.sh"
source scripts_bash/run.sh

OUT=${OUT:-outputs/digits}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
python -c 'import sklearn' 2>/dev/null || python -m pip install --quiet --disable-pip-version-check scikit-learn

run python - "$OUT/digits" <<'PYTHON'
import sys
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

digits = load_digits()
for i, (pixels, label) in enumerate(zip(digits.images, digits.target)):
    path = Path(sys.argv[1], str(label), f"{i:04d}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((pixels * 15).astype("uint8")).resize((32, 32), Image.Resampling.BICUBIC).save(path)
PYTHON
[[ -d $OUT/images ]] || run python scripts/make_shards.py "$OUT/digits" "$OUT/images" --heldout 0.1
[[ -f $OUT/rear.yaml ]] || run python scripts/make_config.py "$OUT/images" "$OUT" --resolution 32 --no-flip
run python scripts/train_tokenizer.py config="$OUT/tokenizer.yaml" training.max_train_steps=500
[[ -d $OUT/train.tokens ]] || run python scripts/pretokenize.py config="$OUT/rear.yaml"
run python scripts/train_rear.py config="$OUT/rear.yaml"
run python scripts/sample_imagenet_rear.py config="$OUT/rear.yaml" experiment.output_dir="$OUT/samples" experiment.generator_checkpoint="$OUT/rear"
run python scripts/reconstruct.py config="$OUT/rear.yaml" experiment.output_dir="$OUT/heldout"
run python evaluation/evaluator.py "$OUT/heldout/reference.npz" "$OUT/samples.npz" --backend efficientnet_lite0
