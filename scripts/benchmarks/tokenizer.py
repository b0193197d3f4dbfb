"""Tokenizer training: what each choice of the recipe for own images is worth, next to k-means of raw pixel patches.

Trains the tokenizer of each config several times with scripts/train_tokenizer.py, each time with one choice undone, and
measures held-out images. The k-means has as many tokens and codebook entries.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from utils.arguments import positive
from utils.config import ROOT, load_config, load_config_as
from utils.files.json_file import read_json
from utils.files.text import user_path

CONVOLUTIONAL = ROOT / "configs/tokenizer_blue_marble.yaml"  # a network with layers at full resolution
CHOICES = {
    "the recipe": [],
    "codebook from one batch": ["vq_training.codebook_init=latents"],
    "no revival of codes": ["vq_training.revive_every=1000000000"],
    "no EMA": ["training.use_ema=false"],
    "no color term": ["vq_training.color_weight=0"],
    "no perceptual term": ["vq_training.perceptual_weight=0"],
    "perceptual term from the start": ["vq_training.perceptual_start=0", "vq_training.perceptual_fraction=1"],
    "convolutions at full resolution": [],
}
COLUMNS = {
    "psnr": "PSNR",
    "ssim": "SSIM",
    "hue_error": "hue error",
    "saturation_error": "saturation error",
    "codebook_used": "codebook use",
    "reconstruction_distance": "distance",
    "seconds": "seconds",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("configs", nargs="+", type=user_path, help="tokenizer.yaml of make_config.py, one per data set")
    parser.add_argument("--steps", type=positive, default=500, help="of each training; default %(default)s")
    parser.add_argument(
        "--choices", nargs="+", choices=CHOICES, metavar="NAME", default=[*CHOICES], help=f"of {', '.join(CHOICES)}"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for path in arguments.configs:
            for number, choice in enumerate(arguments.choices):
                output = Path(folder) / f"{len(rows)}_{number}"
                rows.append({"config": str(path), "choice": choice, **train(path, choice, arguments.steps, output)})
    print(f"\n| data | choice | {' | '.join(COLUMNS.values())} |\n|{' --- |' * (len(COLUMNS) + 2)}")
    for row in rows:
        if row["choice"] == arguments.choices[0]:
            print(f"| {row['config']} | k-means of patches | {row['patch_psnr']:.2f} |{' |' * (len(COLUMNS) - 1)}")
        print(f"| {row['config']} | {row['choice']} | {' | '.join(f'{row[name]:.4g}' for name in COLUMNS)} |")
    return {"steps": arguments.steps, "rows": rows}


def train(path: Path, choice: str, steps: int, output: Path) -> dict[str, Any]:
    """Held-out metrics and the seconds of the steps."""
    from scripts import train_tokenizer  # requires packages that the other benchmarks do without

    common = [
        f"config={path}",
        f"experiment.output_dir={output}",
        f"experiment.save_every={steps}",
        f"training.max_train_steps={steps}",
        f"vq_training.perceptual_start={steps // 2}",
        f"lr_scheduler.params.warmup_steps={min(100, steps // 10)}",
    ]
    changes = {argument.partition("=")[0]: argument for argument in common + CHOICES[choice]}
    if choice == "convolutions at full resolution":
        levels = len(load_config(common).model.vq_model.channel_mult)
        other = load_config([f"config={CONVOLUTIONAL}"]).model.vq_model
        changes["widths"] = f"model.vq_model.channel_mult={other.channel_mult[:levels]}"
        for name in ("model_type", "hidden_channels", "num_res_blocks"):
            changes[name] = f"model.vq_model.{name}={getattr(other, name)}"
    train_tokenizer.main(load_config_as(train_tokenizer.TrainTokenizerConfig, [*changes.values()]))
    metrics = read_json(output / "metrics.json")
    del metrics["verdict"]
    return {**metrics, "seconds": read_json(output / "status.json")["trained_s"]}
