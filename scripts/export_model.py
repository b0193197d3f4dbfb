"""Export a trained model with its tokenizer as a folder for `load_pretrained` and the Hugging Face Hub.

    python scripts/export_model.py outputs/rear_b outputs/rear_b_export
    python scripts/export_model.py ckpt/reAR-B.safetensors outputs/rear_b_export config=configs/rear_b.yaml

RUN is a value of experiment.generator_checkpoint: a run folder, a checkpoint or a weights file. The config is the
run's; for a file without a run, give config=FILE.yaml. KEY=VALUE overrides it: its guidance, temperature, top-k and
top-p become the defaults of sampling from Python.

Writes FOLDER atomically: model.safetensors (the weights for sampling: the EMA if there is one, without training-only
projectors) and config.json; the same files of the tokenizer in tokenizer/; classes.json (class names) if the training
data has names; samples.png; README.md, a model card; export.json, the provenance and sha256 of the files. With --push
these files are uploaded, with the repository's name in the card; log in with `hf auth login` before, or set HF_TOKEN.
"""

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

import numpy as np
import torch

from data.training_batches import known_classes
from modeling.loading import CLASSES_FILE, REFERENCE_FILE, TOKENIZER, load_generator, load_tokenizer
from modeling.model_card import CARD_FILE, model_card
from modeling.rear import ReAR
from modeling.sampling.generate_images import generate_images
from modeling.tokenizers.tokenizer import Tokenizer
from utils.arguments import natural
from utils.config import Config
from utils.errors import first_of, input_errors_exit
from utils.files.atomic import atomic_folder, write_text
from utils.files.hashing import hash_of
from utils.files.hub import SCHEME, upload_files
from utils.files.json_file import read_json
from utils.files.lock import only_writer
from utils.files.provenance import is_made, write_record
from utils.files.text import user_path
from utils.files.weights import weights_sha256
from utils.images import make_captioned_grid, write_png
from utils.run.checkpoint import EMA
from utils.run.manifest import MANIFEST_FILE
from utils.run.metrics_file import METRICS_FILE, read_metrics
from utils.run.run_config import load_run_config
from utils.run.run_environment import code_facts
from utils.run.weights_path import TrainedWeights, find_generator_weights, find_run_folder
from utils.schema import SAMPLING_NAMES

EXPORT_FILE, SAMPLES_FILE = "export.json", "samples.png"
COLUMNS = 8  # of samples.png
TRAINING_KEYS = (
    "model.generator.order",
    "model.generator.perturb_mode",
    "model.generator.perturb_ratio_max",
    "model.generator.randomness_anneal_end",
    "model.generator.transition_alignment_weight",
    "optimizer.params.learning_rate",
    "training.seed",
)
LOADING = """from modeling.loading import load_pretrained
from modeling.sampling.generate_images import generate_images
from utils.images import save_grid

model, tokenizer = load_pretrained({source}{tokenizer_weights})
images = generate_images(model, tokenizer, class_labels={labels}, seed=42)
save_grid(images, "grid.png")"""


def main(options: argparse.Namespace) -> None:
    config = load_run_config(options.run, options.overrides)
    with only_writer(options.folder):
        card = export(config, options.folder, options)
        if options.push is not None:
            url = upload_files(files_to_upload(options.folder, card), options.push, private=options.private)
            print(f"{options.folder}: uploaded, {url}")


def export(config: Config, folder: Path, options: argparse.Namespace) -> str:
    """Write the folder, unless it exists already; returns the model card for the repository of --push. Raises
    InputError for invalid weights, tokenizer or config, or if the folder has other content."""
    tokenizer = load_tokenizer(config)
    weights, config = find_generator_weights(config, tokenizer.sha256())
    model = load_generator(weights.path, config.model)
    labels = []
    if options.samples > 0 and tokenizer.has_images:
        classes = [label for label in range(model.num_classes) if label not in weights.untrained_classes]
        labels = sample_labels(classes, options.samples)
    names = class_names_of(config, weights)
    facts, metrics = card_facts(model, tokenizer, weights, config), run_metrics(weights)

    def card_of(source: str) -> str:
        return model_card(
            config.experiment.name,
            loading=LOADING.format(
                source=json.dumps(source),
                tokenizer_weights=", tokenizer_weights=..." if options.tokenizer == "reference" else "",
                labels=sorted(set(labels)) or [0],
            ),
            facts=facts,
            metrics=metrics,
            picture=f"![samples of class_labels={labels}, seed 42]({SAMPLES_FILE})" if labels else "",
            license=options.license,
        )

    provenance = {
        "sha256 of the model": weights_sha256(model),
        "sha256 of the tokenizer": tokenizer.sha256(),
        "sha256 of the config": hash_of({**model.sections(), "tokenizer": tokenizer.sections()}),
        "sha256 of the class names": None if names is None else hash_of({"names": names}),
        "experiment.name": config.experiment.name,
        **{f"card, {name}": str(value) for name, value in (facts | metrics).items()},
        "--license": options.license,
        "--samples": options.samples,
        "--tokenizer": options.tokenizer,
    }
    if is_made(folder, provenance, folder / EXPORT_FILE):
        print(f"{folder}: already exported from the same weights and config")
        return card_of(str(options.push))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    tokenizer.to(device)
    with atomic_folder(folder) as partial:
        model.write_files(partial, {**weights.record, "tokenizer_sha256": tokenizer.sha256()})
        write_text(partial / CARD_FILE, card_of(folder.name))
        if options.tokenizer == "weights":
            tokenizer.write_files(partial / TOKENIZER)
        else:
            write_reference(partial / TOKENIZER, tokenizer, config.experiment.tokenizer_checkpoint)
        if names is not None:
            write_text(partial / CLASSES_FILE, json.dumps(names, indent=1, ensure_ascii=False) + "\n")
        if labels:
            draw_samples(partial / SAMPLES_FILE, model, tokenizer, labels, names)
        figures = {key: weights.record.get(key) for key in ("step", "data", "code")}
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        write_record(folder, provenance, partial / EXPORT_FILE, {**figures, "exported_by": code_facts()}, files)
    print(f"{folder}: exported; look at {folder / CARD_FILE}")
    return card_of(str(options.push))


def files_to_upload(folder: Path, card: str) -> dict[str, Path | bytes]:
    """The files that the export wrote, by name, with the model card for the Hub instead of the local one."""
    record, encoded = read_json(folder / EXPORT_FILE), card.encode()
    record["files"][CARD_FILE] = {"bytes": len(encoded), "sha256": hashlib.sha256(encoded).hexdigest()}
    changed = {CARD_FILE: encoded, EXPORT_FILE: json.dumps(record, indent=1).encode() + b"\n"}
    return {name: folder / name for name in record["files"]} | changed


def write_reference(folder: Path, tokenizer: Tokenizer, source: str) -> None:
    """Write the tokenizer's config, and the name and sha256 of its weights instead of a copy."""
    folder.mkdir()
    tokenizer.write_config(folder)
    name = source if source.startswith(SCHEME) else Path(source).name  # without folders of this machine
    reference = {"file": name, "sha256 of the weights": tokenizer.sha256()}
    write_text(folder / REFERENCE_FILE, json.dumps(reference, indent=1) + "\n")


def class_names_of(config: Config, weights: TrainedWeights) -> list[str] | None:
    """Names of all classes; None: unknown."""
    found, count = known_classes(config, weights.class_names), config.model.generator.condition_num_classes
    return found[0][:count] if found is not None and len(found[0]) >= count else None


def sample_labels(classes: list[int], count: int) -> list[int]:
    """Labels of `count` images: up to `COLUMNS` of the classes over their whole range, repeated."""
    columns = min(COLUMNS, count, len(classes))
    chosen = np.linspace(0, len(classes) - 1, columns).round().astype(int).tolist()
    return [classes[chosen[i % columns]] for i in range(count)]


def draw_samples(path: Path, model: ReAR, tokenizer: Tokenizer, labels: list[int], names: list[str] | None) -> None:
    captions = [str(label) if names is None else names[label] for label in labels]
    write_png(path, make_captioned_grid(generate_images(model, tokenizer, labels), captions, len(set(labels))))


def card_facts(model: ReAR, tokenizer: Tokenizer, weights: TrainedWeights, config: Config) -> dict[str, object]:
    """The model, and what its weights record about their training."""
    generator, resolution = config.model.generator, tokenizer.resolution
    facts = {
        **model.card_facts(),
        "blocks": f"{generator.num_hidden_layers} of width {generator.hidden_size}",
        "classes": f"{model.num_classes}, labels from 0",
        "images": f"{resolution} x {resolution} pixels" if tokenizer.has_images else "none, tokens only",
        "tokens": f"{tokenizer.image_seq_len} per image, codebook of {tokenizer.codebook_size}",
        "tokenizer": tokenizer.model_type,
        "sha256 of the tokenizer": tokenizer.sha256(),
        "sampling": ", ".join(f"{key} {getattr(generator, key)}" for key in SAMPLING_NAMES),
        "training": "not recorded in the weights",
    }
    if weights.step is not None:
        facts |= {
            "training": f"{weights.step} steps",
            "classes without training samples": first_of(weights.untrained_classes, 10) or "none recorded",
            "sha256 of the training data": weights.record.get("data"),
            "sha256 of the training code": weights.record.get("code"),
        }
    if trained := weights.config:
        in_checkpoint = (weights.path.parent / MANIFEST_FILE).is_file()  # else final weights: the EMA if there is one
        is_ema = weights.path.stem == EMA if in_checkpoint else trained.get("training.use_ema")
        facts |= {
            "training": f"{weights.step} of {trained.get('training.max_train_steps')} steps",
            "training settings": ", ".join(f"{key.rpartition('.')[2]} {trained.get(key)}" for key in TRAINING_KEYS),
            "weights": "EMA" if is_ema else "of the last step",
        }
    return facts


def run_metrics(weights: TrainedWeights) -> dict[str, str]:
    """The last validation metrics and scores of the run up to the step of the weights."""
    run = find_run_folder(weights)
    if run is None or weights.step is None or not (run / METRICS_FILE).is_file():
        return {}
    rows = [row for row in read_metrics(run / METRICS_FILE) if row["step"] <= weights.step]
    return {
        name: f"{value:.5g} at step {row['step']:.0f}"
        for row in rows
        for name, value in row.items()
        if name.startswith(("val/", "eval/"))
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=os.path.expanduser, help="run folder, checkpoint or weights file")
    parser.add_argument("folder", metavar="FOLDER", type=user_path, help="output folder; must not exist")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="of the config; config=FILE.yaml replaces it")
    parser.add_argument("--license", help="of the weights, a Hub identifier (default: none is stated)")
    parser.add_argument("--samples", type=natural, default=16, help="in samples.png (default: %(default)s; 0: none)")
    parser.add_argument(
        "--tokenizer",
        choices=("weights", "reference"),
        default="weights",
        help="copy its weights, or only their file name and sha256 (default: %(default)s)",
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="repository of the Hub to upload to; created if needed")
    parser.add_argument("--private", action="store_true", help="make a new repository of --push private")
    with input_errors_exit():
        main(parser.parse_intermixed_args())  # KEY=VALUE may follow an option
