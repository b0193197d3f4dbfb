"""Write configs for your own images: classes from the shards, grid and codebook from the tokenizer.

    python scripts/make_config.py outputs/mine/images outputs/mine --resolution 64
    python scripts/make_config.py shards outputs/mine --resolution 256 --base configs/rear_b.yaml \\
        --tokenizer maskgit-vqgan-imagenet-f16-256.bin

IMAGES is a folder that scripts/make_shards.py has written. Without --tokenizer, a new one is configured, with the sizes
of --new-tokenizer. All other settings come from --base.

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
from utils.config import ROOT, load_config, read_yaml
from utils.errors import InputError, input_errors_exit
from utils.files.atomic import write_text
from utils.files.hub import local_file
from utils.files.text import user_path
from utils.files.weights import load_state_dict
from utils.keys import keys_of
from utils.schema import OWN_NUMBER_OF_CODES, Config, VQModelConfig

SMALL_BASE, SMALL_TOKENIZER = ROOT / "configs/rear_blue_marble.yaml", ROOT / "configs/tokenizer_blue_marble.yaml"


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    output, resolution = arguments.output, arguments.resolution
    train, validation = find_shards(arguments.images)
    train_images, heldout_images = open_images(train), open_images(validation)
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
    if arguments.tokenizer is None:
        new = arguments.new_tokenizer
        sizes, tokenizer = load_config([f"config={new}"]).model.vq_model, output / "tokenizer"
        own = {"experiment.name": f"{output.name}_tokenizer", "experiment.output_dir": str(tokenizer)}
        settings = {**data, **tokenizer_settings(sizes, resolution), **own}
        write_yaml(output / "tokenizer.yaml", new, settings, "python scripts/train_tokenizer.py")
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
    if arguments.no_flip:
        settings["dataset.preprocessing.pretokenize_crops"] = "center"
    config = write_yaml(output / "rear.yaml", arguments.base, settings, "accelerate launch scripts/train_rear.py")
    print(
        f"{output}: {len(train_images)} training and {len(heldout_images)} validation images of {num_classes} classes, "
        f"{config.model.generator.image_seq_len} codes of {sizes.codebook_size} per image"
    )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=user_path, help="folder with shards")
    parser.add_argument("output", type=user_path, help="folder for the configs and their outputs")
    parser.add_argument("--resolution", type=int, required=True, help="pixels, a multiple of 8 for the small tokenizer")
    parser.add_argument(
        "--tokenizer", type=os.path.expanduser, help="trained weights, .bin, .safetensors or hf://OWNER/REPO/FILE"
    )
    parser.add_argument("--new-tokenizer", type=user_path, default=SMALL_TOKENIZER, help="config; default %(default)s")
    parser.add_argument("--base", type=user_path, default=SMALL_BASE, help="default %(default)s")
    parser.add_argument("--no-flip", action="store_true", help="for images that must not be mirrored")
    return parser.parse_args(argv)


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
