"""Write configs for your own images: classes from the shards, grid and codebook from the tokenizer.

    python scripts/make_config.py outputs/mine/images outputs/mine --resolution 64 --minutes 30
    python scripts/make_config.py shards outputs/mine --resolution 256 --base configs/rear_b.yaml \\
        --tokenizer maskgit-vqgan-imagenet-f16-256.bin

IMAGES is a folder of scripts/make_shards.py. Without --tokenizer, a new one is configured: its grid, codebook, steps
and schedules follow from the resolution, the number of images and --minutes, after a few steps are measured on this
machine. With --new-tokenizer, its config decides instead. All other settings come from --base.

Writes to OUTPUT: rear.yaml (for pretokenize.py, train_rear.py and all that follows) and, without --tokenizer,
tokenizer.yaml (for train_tokenizer.py). Edit them as you like.
"""

import argparse
import math
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

import numpy as np
from omegaconf import OmegaConf

from data.images.image_source import ImageSource
from data.images.notices import notify
from data.images.reading import open_images
from data.images.shard_writer import HELDOUT_PREFIX
from modeling.tokenizers.registry import check_weights, code_shape, config_from_state_dict
from utils.arguments import positive
from utils.config import ROOT, load_config, load_config_as, read_yaml
from utils.errors import InputError, input_errors_exit
from utils.files.atomic import write_text
from utils.files.hub import local_file
from utils.files.text import user_path
from utils.files.weights import load_state_dict
from utils.keys import keys_of
from utils.schema import OWN_NUMBER_OF_CODES, Config, VQModelConfig

SMALL_BASE, OWN_TOKENIZER = ROOT / "configs/rear_blue_marble.yaml", ROOT / "configs/tokenizer_own_images.yaml"
SMALL_RESOLUTION, TOKENS, TOKENS_OF_LARGE = 64, 64, 256  # per image, up to this many pixels and above
MIN_TOKEN_SIZE, MAX_TOKEN_SIZE = 8, 32
MANY_IMAGES, CODEBOOK_OF_MANY = 20_000, 1024
MIN_CODEBOOK, TOKENS_PER_ENTRY = 16, 8  # training images have at least so many tokens per entry of the codebook
TOKENIZER_SHARE, GENERATOR_SHARE = 1 / 3, 1 / 2  # of --minutes; the rest is for tokens, samples and scores
MIN_SAMPLES, MAX_SAMPLES = 64, 500
DEFAULT_RESOLUTIONS, EXAMINED_IMAGES = (4, 8, 16, 32), 100
OVERHEAD = 0.85  # share of a run that is spent in steps, the rest in starting, validation and saving
MIN_STEPS, MAX_PASSES = 200, 300


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    output = arguments.output
    is_budgeted = arguments.tokenizer is None and arguments.new_tokenizer is None
    if not is_budgeted and (arguments.tokens is not None or arguments.resolution is None):
        raise InputError(
            "--tokenizer, --new-tokenizer: expected with --resolution and without --tokens, which the tokenizer decides"
        )
    train, validation = find_shards(arguments.images)
    train_images, heldout_images = open_images(train), open_images(validation)
    resolution = arguments.resolution or small_resolution(train_images)
    if validation == train:
        notify(f"{arguments.images}: no validation shards (make_shards.py --heldout): training images are used instead")
    num_classes = len(train_images.class_names or []) or int(train_images.class_ids.max()) + 1
    data = {
        "dataset.params.train_shards_path_or_url": train,
        "dataset.params.eval_shards_path_or_url": validation,
        "dataset.preprocessing.random_flip": not arguments.no_flip,
        "experiment.max_train_examples": len(train_images),
    }
    output.mkdir(parents=True, exist_ok=True)
    if is_budgeted:  # requires the packages of requirements-dev.txt
        from scripts.benchmarks.step_time import generator_step_seconds
        from scripts.train_tokenizer import TrainTokenizerConfig, step_seconds
    if arguments.tokenizer is None:
        new = arguments.new_tokenizer or OWN_TOKENIZER
        sizes, tokenizer = load_config([f"config={new}"]).model.vq_model, output / "tokenizer"
        if is_budgeted:
            sizes = sizes_for(sizes, resolution, tokens=arguments.tokens, num_images=len(train_images))
        own = {"experiment.name": f"{output.name}_tokenizer", "experiment.output_dir": str(tokenizer)}
        settings = {**data, **tokenizer_settings(sizes, resolution), **own}
        path, command = output / "tokenizer.yaml", "python scripts/train_tokenizer.py"
        write_yaml(path, new, settings, command)
        if is_budgeted:
            written = load_config_as(TrainTokenizerConfig, [f"config={path}"])
            seconds = step_seconds(written)
            steps = steps_within(60 * TOKENIZER_SHARE * arguments.minutes, seconds, len(train_images), written)
            write_yaml(path, new, {**settings, **tokenizer_schedules(steps)}, command)
            report_length("tokenizer", steps, seconds)
        tokenizer = tokenizer / "tokenizer.safetensors"
    else:
        tokenizer = arguments.tokenizer
        sizes = sizes_in(tokenizer, resolution)
    settings = {
        **data,
        **tokenizer_settings(sizes, resolution),
        "experiment.name": output.name,
        "experiment.output_dir": str(output / "rear"),
        "experiment.tokenizer_checkpoint": str(tokenizer),
        "model.generator.condition_num_classes": num_classes,
        "dataset.params.pretokenization": str(output / "train.tokens"),
        "sampling.num_fid_samples": balanced_count(heldout_images, num_classes),
    }
    if is_budgeted:
        settings["sampling.num_fid_samples"] = max(num_classes, MIN_SAMPLES, min(len(heldout_images), MAX_SAMPLES))
    if arguments.no_flip:
        settings["dataset.preprocessing.pretokenize_crops"] = "center"
    path, command = output / "rear.yaml", "accelerate launch scripts/train_rear.py"
    config = write_yaml(path, arguments.base, settings, command)
    if is_budgeted and arguments.base == SMALL_BASE:
        seconds = generator_step_seconds(config)
        steps = steps_within(60 * GENERATOR_SHARE * arguments.minutes, seconds, len(train_images), config)
        config = write_yaml(path, arguments.base, {**settings, **generator_schedules(steps)}, command)
        report_length("generator", steps, seconds)
    print(
        f"{output}: {len(train_images)} training and {len(heldout_images)} validation images of {num_classes} classes, "
        f"{resolution} x {resolution} pixels, "
        f"{config.model.generator.image_seq_len} codes of {sizes.codebook_size} per image"
    )
    if is_budgeted:
        edge = resolution // code_shape(sizes)[0]
        print(
            f"each token covers {edge} x {edge} pixels (--tokens: more are sharper, and slower to train and sample); "
            f"a codebook of {sizes.codebook_size} suits {len(train_images)} images"
        )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=user_path, help="folder with shards")
    parser.add_argument("output", type=user_path, help="folder for the configs and their outputs")
    parser.add_argument("--resolution", type=positive, help="pixels; default: 32, less for smaller images")
    parser.add_argument(
        "--tokenizer", type=os.path.expanduser, help="trained weights, .bin, .safetensors or hf://OWNER/REPO/FILE"
    )
    parser.add_argument("--new-tokenizer", type=user_path, help=f"config, instead of {OWN_TOKENIZER.name} and a budget")
    parser.add_argument("--tokens", type=positive, help="tokens per image; default: 64 up to 64 pixels, 256 above")
    parser.add_argument(
        "--minutes", type=positive, default=30, help="for all steps of own_images.sh; default %(default)s"
    )
    parser.add_argument("--base", type=user_path, default=SMALL_BASE, help="default %(default)s")
    parser.add_argument("--no-flip", action="store_true", help="for images that must not be mirrored")
    return parser.parse_args(argv)


def small_resolution(images: ImageSource) -> int:
    """The largest of `DEFAULT_RESOLUTIONS` that most of the images reach with both edges."""
    indices = range(0, len(images), max(1, len(images) // EXAMINED_IMAGES))
    edge = np.median([min(images.load(index).size) for index in indices])
    return max((size for size in DEFAULT_RESOLUTIONS if size <= edge), default=DEFAULT_RESOLUTIONS[0])


def sizes_for(sizes: VQModelConfig, resolution: int, tokens: int | None, num_images: int) -> VQModelConfig:
    """The tokenizer's sizes for this resolution: patches of 2^k pixels so that there are `tokens` per image, by default
    at least `TOKENS` or `TOKENS_OF_LARGE` if possible; raises InputError if no patches give `tokens`."""
    patches = [2**k for k in range(resolution.bit_length()) if resolution % 2**k == 0]  # pixels
    by_tokens = {(resolution // patch) ** 2: patch for patch in patches}
    if tokens is None:
        least = TOKENS if resolution <= SMALL_RESOLUTION else TOKENS_OF_LARGE
        tokens = min((count for count in by_tokens if count >= least), default=max(by_tokens))
    if tokens not in by_tokens:
        raise InputError(
            f"--tokens {tokens}: expected one of {', '.join(map(str, sorted(by_tokens)))} at --resolution {resolution}"
        )
    patch = by_tokens[tokens]
    return replace(
        sizes,
        resolution=resolution,
        channel_mult=[1] * patch.bit_length(),
        token_size=min(MAX_TOKEN_SIZE, max(MIN_TOKEN_SIZE, 3 * patch**2 // 2)),
        codebook_size=codebook_for(num_images, tokens, usual=sizes.codebook_size),
    )


def codebook_for(num_images: int, tokens: int, usual: int) -> int:
    """Number of codebook entries: `usual`, more for many images, and a power of 2 below it for few."""
    if num_images >= MANY_IMAGES:
        return CODEBOOK_OF_MANY
    affordable = max(MIN_CODEBOOK, num_images * tokens // TOKENS_PER_ENTRY)
    return min(usual, 2 ** int(math.log2(affordable)))


def steps_within(budget_s: float, step_s: float, num_images: int, config: Config) -> int:
    """Steps that take this time, but at least `MIN_STEPS` and at most `MAX_PASSES` over the images, beyond which a
    network only learns them by heart."""
    most = max(MIN_STEPS, MAX_PASSES * num_images // config.training.per_gpu_batch_size)
    return max(MIN_STEPS, min(most, int(OVERHEAD * budget_s / step_s)))


def tokenizer_schedules(steps: int) -> dict[str, Any]:
    return {
        "training.max_train_steps": steps,
        "experiment.save_every": max(1, steps // 4),
        "lr_scheduler.params.warmup_steps": min(100, steps // 10),
        "vq_training.perceptual_start": steps // 2,
    }


def generator_schedules(steps: int) -> dict[str, Any]:
    return {
        "training.max_train_steps": steps,
        "experiment.save_every": max(1, steps // 4),
        "experiment.generate_every": max(1, steps // 4),
        "experiment.eval_every": max(1, steps // 3),
        "lr_scheduler.params.warmup_steps": min(50, steps // 10),
        "model.generator.randomness_anneal_end": 3 * steps // 4,
    }


def report_length(name: str, steps: int, step_s: float) -> None:
    minutes = steps * step_s / OVERHEAD / 60
    print(f"{name}: {steps} steps of {step_s:.3f} s, about {minutes:.0f} minutes on this machine", flush=True)


def find_shards(folder: Path) -> tuple[str, str]:
    """Patterns of the training and the validation shards; without validation shards, the training shards twice. Raises
    InputError without shards, or for training shards of several prefixes."""
    prefixes = sorted({path.name.rpartition("-")[0] for path in folder.glob("*-*.tar")})
    train = [prefix for prefix in prefixes if prefix != HELDOUT_PREFIX]
    if len(train) != 1:
        raise InputError(f"{folder}: found shards of the kinds {train}, expected one, made by scripts/make_shards.py")
    validation = HELDOUT_PREFIX if HELDOUT_PREFIX in prefixes else train[0]
    return str(folder / f"{train[0]}-*.tar"), str(folder / f"{validation}-*.tar")


def sizes_in(tokenizer: str, resolution: int) -> VQModelConfig:
    """Sizes of a tokenizer from its weights; raises InputError for other weights, or a resolution that does not fit."""
    state = load_state_dict(local_file(tokenizer))
    sizes = replace(config_from_state_dict(state), resolution=resolution)
    try:
        check_weights(sizes, state, tokenizer)
    except InputError as error:
        raise InputError(f"--resolution {resolution}: {error}") from error
    return sizes


def tokenizer_settings(sizes: VQModelConfig, resolution: int) -> dict[str, Any]:
    """The section model.vq_model; raises InputError for a resolution that does not fit."""
    sizes = replace(sizes, resolution=resolution)
    try:
        sizes.num_latent_tokens = math.prod(code_shape(sizes))
    except InputError as error:
        raise InputError(f"--resolution {resolution}: {error}") from error
    settings = {f"model.vq_model.{key}": value for key, value in asdict(sizes).items()}
    if sizes.model_type not in OWN_NUMBER_OF_CODES:
        del settings["model.vq_model.num_latent_tokens"]  # it follows from the others
    return settings


def balanced_count(images: ImageSource, num_classes: int) -> int:
    """Number of images with as many of each class as the smallest class has; all images if a class has none."""
    return num_classes * int(np.bincount(images.class_ids, minlength=num_classes).min()) or len(images)


def write_yaml(path: Path, base: Path, settings: dict[str, Any], command: str) -> Config:
    """Write the settings over the settings of `base`, without derived sizes, and read them back, which checks them;
    raises InputError for sizes that do not fit."""
    read_yaml(base)  # refuses what OmegaConf would expand without end
    merged = OmegaConf.load(base)
    for key, value in settings.items():
        OmegaConf.update(merged, key, value)
    for derived in (key for key in keys_of(Config).values() if key.source and key.name not in settings):
        section, _, name = derived.name.rpartition(".")
        (OmegaConf.select(merged, section) or {}).pop(name, None)
    header = f"# Written by scripts/make_config.py from {base.name}.\n#   {command} config={path}\n"
    write_text(path, header + OmegaConf.to_yaml(merged))
    return load_config([f"config={path}"])


if __name__ == "__main__":
    with input_errors_exit():
        main()
