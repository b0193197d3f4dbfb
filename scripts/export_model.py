"""Export a trained model with its tokenizer as a folder that Python loads in one line, and the Hugging Face Hub takes.

    python scripts/export_model.py outputs/rear_b outputs/rear_b_export
    python scripts/export_model.py ckpt/reAR-B.safetensors outputs/rear_b_export config=configs/rear_b.yaml

RUN is what experiment.generator_checkpoint takes: a run folder, a checkpoint or a weights file. The config is the run's
own; of a file without a run it is given as config=FILE.yaml. KEY=VALUE overrides it: what it says of guidance,
temperature, top-k and top-p is what sampling from Python begins with.

Writes FOLDER, whole or not at all: model.safetensors (the weights that sampling reads: the EMA if there is one, and no
projectors, which are for training) and config.json; the same of the tokenizer in tokenizer/; classes.json, the names of
the classes, if the training data tell them; samples.png; README.md, a model card; export.json, what all was made from.
With --push the folder is uploaded; log in with `hf auth login` before, or set HF_TOKEN.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

import numpy as np
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from data.training_batches import training_classes
from modeling.model_card import SAMPLES_FILE, CardFacts, model_card
from modeling.pretrained import CLASSES_FILE, REFERENCE_FILE, TOKENIZER, generate_images
from modeling.rear import ReAR
from modeling.sampling.image_sampler import load_trained
from modeling.tokenizers.registry import load_tokenizer
from modeling.tokenizers.tokenizer import Tokenizer
from utils.config import Config, load_config
from utils.distributed import DistributedContext
from utils.errors import InputError, first_line, input_errors_exit
from utils.files.atomic import atomic_folder
from utils.files.hashing import hash_of
from utils.files.hub import SCHEME
from utils.files.lock import only_writer
from utils.files.provenance import is_made, write_record
from utils.files.weights import weights_sha256
from utils.images import make_captioned_grid, write_png
from utils.run.checkpoint import EMA
from utils.run.manifest import MANIFEST_FILE
from utils.run.metrics_file import METRICS_FILE, read_metrics
from utils.run.run_environment import code_facts
from utils.run.trained_weights import TrainedWeights

EXPORT_FILE = "export.json"
COLUMNS = 8  # of the picture: classes
LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")  # the Hub's identifiers


def main(arguments: argparse.Namespace) -> None:
    check_options(arguments)
    config, folder = config_of(arguments.run, arguments.overrides), arguments.folder
    with only_writer(folder):
        export(config, folder, arguments)
    if arguments.push is not None:
        push(folder, arguments.push, arguments.private)


def check_options(arguments: argparse.Namespace) -> None:
    """
    Raises:
        InputError: an option with a value that cannot be.
    """
    if arguments.samples < 0:
        raise InputError(f"--samples {arguments.samples}: expected 0 or more")
    if arguments.license is not None and not LICENCE.fullmatch(arguments.license):
        raise InputError(f"--license {arguments.license}: expected an identifier of the Hub, as mit or cc-by-nc-4.0")
    try:
        validate_repo_id(arguments.push or "owner/name")
    except HFValidationError as error:
        raise InputError(f"--push {arguments.push}: {first_line(error)}") from error


def config_of(run: str, overrides: list[str]) -> Config:
    """The config of a run, checkpoint or file in one of them; or the one that is given.

    Raises:
        InputError: there is none, or it is wrong.
    """
    sources = [] if any(word.startswith("config=") for word in overrides) else [find_config(Path(run))]
    return load_config([*sources, "experiment.output_dir=unused", f"experiment.generator_checkpoint={run}", *overrides])


def find_config(run: Path) -> str:
    for folder in (run, *run.resolve().parents[:2]):
        if (folder / "config.yaml").is_file():
            return f"config={folder / 'config.yaml'}"
    raise InputError(f"{run}: found no config.yaml of a run there; give config=FILE.yaml")


def export(config: Config, folder: Path, arguments: argparse.Namespace) -> None:
    """Write the folder, unless it is there already.

    Raises:
        InputError: weights, tokenizer or config are wrong, or the folder holds something else.
    """
    tokenizer = load_tokenizer(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, weights = load_trained(config, tokenizer, DistributedContext(0, 1, device))
    made_from = {
        "sha256 of the model": weights_sha256(model),
        "sha256 of the tokenizer": tokenizer.sha256(),
        "sha256 of the config": hash_of({**model.sections(), "tokenizer": tokenizer.sections()}),
        **{f"--{name}": getattr(arguments, name) for name in ("license", "samples", "tokenizer")},
    }
    if is_made(folder, made_from, folder / EXPORT_FILE):
        print(f"{folder}: made from the same already")
        return
    model.to(device).eval()
    tokenizer.to(device)
    record = {**weights.record, "tokenizer_sha256": tokenizer.sha256()}
    as_reference = arguments.tokenizer == "reference"
    facts = CardFacts(
        *(config, weights.step, weights.record, numbers_of(weights), training_class_names(config)),
        *(is_ema(weights.path, config), as_reference),
    )
    source = arguments.push or folder.name  # not the way to it, which is nobody's business
    with atomic_folder(folder) as partial:
        model.write(partial, record)
        write_tokenizer(tokenizer, partial / TOKENIZER, config, as_reference)
        if facts.class_names is not None:
            (partial / CLASSES_FILE).write_text(json.dumps(facts.class_names, indent=1, ensure_ascii=False) + "\n")
        if arguments.samples and tokenizer.has_images:
            facts.shown = draw_samples(partial / SAMPLES_FILE, model, tokenizer, facts.class_names, arguments.samples)
        (partial / "README.md").write_text(model_card(facts, model, tokenizer, arguments.license, source))
        figures = {key: weights.record.get(key) for key in ("step", "data", "code")}
        write_record(folder, made_from, partial / EXPORT_FILE, {**figures, "exported_by": code_facts()})
    print(f"{folder}: exported; look at {folder / 'README.md'}")


def is_ema(path: Path, config: Config) -> bool:
    """Of a checkpoint the file tells; weights that lie alone are those that sampling reads."""
    of_checkpoint = (path.parent / MANIFEST_FILE).is_file()
    return path.stem == EMA if of_checkpoint else config.training.use_ema


def training_class_names(config: Config) -> list[str] | None:
    """Of the training data, if they are here and tell them."""
    found, count = training_classes(config), config.model.generator.condition_num_classes
    return found[0][:count] if found is not None and len(found[0]) >= count else None


def numbers_of(weights: TrainedWeights) -> dict[str, tuple[float, int]]:
    """The last held-out numbers and scores in the metrics of the run up to the step of the weights, with their step."""
    metrics = next((path for p in weights.path.resolve().parents[:2] if (path := p / METRICS_FILE).is_file()), None)
    if metrics is None or weights.step is None:
        return {}
    rows = [row for row in read_metrics(metrics) if row["step"] <= weights.step]
    return {
        name: (value, int(row["step"]))
        for row in rows
        for name, value in row.items()
        if name.startswith(("val/", "eval/"))
    }


def write_tokenizer(tokenizer: Tokenizer, folder: Path, config: Config, as_reference: bool) -> None:
    folder.mkdir()
    if not as_reference:
        tokenizer.write(folder, {})
    else:
        tokenizer.write_config(folder)
        source = config.experiment.tokenizer_checkpoint
        name = source if source.startswith(SCHEME) else Path(source).name
        reference = {"file": name, "sha256 of the weights": tokenizer.sha256()}
        (folder / REFERENCE_FILE).write_text(json.dumps(reference, indent=1) + "\n")


def draw_samples(path: Path, model: ReAR, tokenizer: Tokenizer, names: list[str] | None, count: int) -> list[int]:
    """A picture of `count` images, in which some classes take turns; their labels."""
    columns = min(COLUMNS, count, model.num_classes)
    classes = np.linspace(0, model.num_classes - 1, columns).round().astype(int).tolist()
    labels = [classes[i % columns] for i in range(count)]
    captions = [str(label) if names is None else names[label] for label in labels]
    write_png(path, make_captioned_grid(generate_images(model, tokenizer, labels), captions, columns))
    return labels


def push(folder: Path, repository: str, private: bool) -> None:
    """
    Raises:
        InputError: the Hub does not answer, or refuses.
    """
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        url: Any = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Upload {folder.name}")
    except Exception as error:  # whatever the network library of this release of huggingface_hub raises
        raise InputError(f"--push {repository}: {first_line(error)}; {folder} is complete") from error
    print(f"{folder}: uploaded, {url}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="run folder, checkpoint or weights file")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="that is written; must not be there")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="of the config; config=FILE.yaml is another")
    parser.add_argument("--license", help="of the weights, as the Hub calls it (default: none is stated)")
    parser.add_argument("--samples", type=int, default=16, help="images in samples.png (default: %(default)s; 0: none)")
    parser.add_argument(
        "--tokenizer",
        choices=("weights", "reference"),
        default="weights",
        help="copy its weights, or only tell their file and sha256 (default: %(default)s)",
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="repository of the Hub to upload to; made if need be")
    parser.add_argument("--private", action="store_true", help="a repository that --push makes is private")
    with input_errors_exit():
        main(parser.parse_args())
