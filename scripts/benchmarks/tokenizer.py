"""Tokenizer training: what each choice of the recipe for own images is worth, next to k-means of raw pixel patches.

Trains the tokenizer of each config several times with scripts/train_tokenizer.py, each time with one choice undone, and
measures held-out images. The k-means has as many tokens and codebook entries. With --speed instead of configs: images
per second of training, alternately with the convolutional tokenizer of configs/tokenizer_blue_marble.yaml.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.benchmarks.measure import interleaved
from scripts.make_config import OWN_TOKENIZER, sizes_for, tokenizer_settings
from utils.arguments import positive
from utils.config import ROOT, load_config, load_config_as
from utils.errors import InputError
from utils.files.json_file import read_json
from utils.files.text import user_path

if TYPE_CHECKING:  # it requires packages that the other benchmarks do without
    from scripts.train_tokenizer import TrainTokenizerConfig

CONVOLUTIONAL = ROOT / "configs/tokenizer_blue_marble.yaml"  # a network with layers at full resolution
CHOICES = {
    "the recipe": [],
    "codebook from one batch": ["vq_training.codebook_init=latents"],
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
ROUNDS, BUDGET_S = 12, 60  # of each measured step of --speed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("configs", nargs="*", type=user_path, help="tokenizer.yaml of make_config.py, one per data set")
    parser.add_argument("--steps", type=positive, default=500, help="of each training; default %(default)s")
    parser.add_argument(
        "--choices", nargs="+", choices=CHOICES, metavar="NAME", default=[*CHOICES], help=f"of {', '.join(CHOICES)}"
    )
    parser.add_argument("--speed", nargs="+", type=positive, metavar="PIXELS", help="resolutions, instead of configs")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    if bool(arguments.configs) == bool(arguments.speed):
        raise InputError("benchmark.py tokenizer: expected either configs or --speed")
    return compare_speed(arguments.speed) if arguments.speed else compare_choices(arguments)


def compare_choices(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train with each choice undone; prints a table of held-out metrics, a row after each training."""
    rows: list[dict[str, Any]] = []
    print(f"\n| data | choice | {' | '.join(COLUMNS.values())} |\n|{' --- |' * (len(COLUMNS) + 2)}")
    with tempfile.TemporaryDirectory() as folder:
        for path in arguments.configs:
            for number, choice in enumerate(arguments.choices):
                metrics = train(path, choice, arguments.steps, output=Path(folder) / str(len(rows)))
                patches = {name: metrics.pop(f"patch_{name}", None) for name in COLUMNS}
                if number == 0:
                    rows.append({"data": str(path), "choice": "k-means of patches", **patches})
                    print(table_row(rows[-1]), flush=True)
                rows.append({"data": str(path), "choice": choice, **metrics})
                print(table_row(rows[-1]), flush=True)
    return {"steps": arguments.steps, "rows": rows}


def table_row(row: dict[str, Any]) -> str:
    cells = ["" if row.get(name) is None else f"{row[name]:.4g}" for name in COLUMNS]
    return f"| {row['data']} | {row['choice']} | {' | '.join(cells)} |"


def train(path: Path, choice: str, steps: int, output: Path) -> dict[str, Any]:
    """Held-out metrics and the seconds of the steps."""
    from scripts import train_tokenizer

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


def compare_speed(resolutions: list[int]) -> dict[str, Any]:
    """Measure whole training steps of the recipe and of the convolutional tokenizer; prints a table of images per
    second."""
    rows: list[dict[str, Any]] = []
    for resolution in resolutions:
        row = {"resolution": resolution, **images_per_second(resolution)}
        rows.append({**row, "ratio": row["recipe"] / row["convolutional"]})
    print("\n| pixels | recipe, images/s | convolutional, images/s | ratio |\n| --- | --- | --- | --- |")
    for row in rows:
        print(f"| {row['resolution']} | {row['recipe']:.1f} | {row['convolutional']:.1f} | {row['ratio']:.2f} |")
    return {"rows": rows}


def images_per_second(resolution: int) -> dict[str, float]:
    """Of the steps before and after `vq_training.perceptual_start`, in the proportion of a whole training."""
    from scripts.train_tokenizer import early_fraction, made_up_step

    own = load_config([f"config={OWN_TOKENIZER}"]).model.vq_model
    sizes = tokenizer_settings(sizes_for(own, resolution, tokens=None, num_images=1), resolution)
    configs = {
        "recipe": trainer_config(OWN_TOKENIZER, sizes),
        "convolutional": trainer_config(CONVOLUTIONAL, {"model.vq_model.resolution": resolution}),
    }
    steps: dict[str, Callable[[], None]] = {}
    for name, config in configs.items():
        take = made_up_step(config)
        steps[f"{name} early"] = partial(take, 0)
        steps[f"{name} late"] = partial(take, config.vq_training.perceptual_start)
    interleaved(steps, repeats=1, budget=BUDGET_S)  # warm-up
    measured = {
        step: statistics.median(times) for step, times in interleaved(steps, repeats=ROUNDS, budget=BUDGET_S).items()
    }
    rates = {}
    for name, config in configs.items():
        early = early_fraction(config)
        seconds = early * measured[f"{name} early"] + (1 - early) * measured[f"{name} late"]
        rates[name] = config.training.per_gpu_batch_size / seconds
    return rates


def trainer_config(path: Path, settings: dict[str, Any]) -> "TrainTokenizerConfig":
    from scripts.train_tokenizer import TrainTokenizerConfig

    return load_config_as(
        TrainTokenizerConfig, [f"config={path}", *(f"{key}={value}" for key, value in settings.items())]
    )
