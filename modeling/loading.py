"""Load an exported model with its tokenizer, the generator for sampling, weights to fine-tune, or the tokenizer alone.

Paths to a run, a checkpoint or published weights are resolved by `utils.run.weights_path`.
"""

import warnings
from pathlib import Path
from typing import Any

import torch

from modeling.pretrained_model import CONFIG_FILE, WEIGHTS_FILE, build_from_folder
from modeling.rear import ReAR
from modeling.tokenizers.registry import build_tokenizer
from modeling.tokenizers.tokenizer import Tokenizer
from utils.errors import InputError, first_of
from utils.files.hub import local_file, local_folder
from utils.files.json_file import read_json
from utils.files.weights import load_state_dict, load_strict, read_record
from utils.schema import Config, ModelConfig

TOKENIZER = "tokenizer"  # sub-folder of the model's folder
REFERENCE_FILE = "reference.json"  # instead of the tokenizer's weights: their name and sha256
CLASSES_FILE = "classes.json"  # names of the classes in the order of their ids
FILES = (CONFIG_FILE, WEIGHTS_FILE, CLASSES_FILE, f"{TOKENIZER}/*.json", f"{TOKENIZER}/{WEIGHTS_FILE}")


def load_pretrained(
    source: str | Path,
    tokenizer_weights: str | None = None,
    device: str | torch.device | None = None,
    **download: Any,
) -> tuple[ReAR, Tokenizer]:
    """The model and the tokenizer of a folder of scripts/export_model.py, in eval mode and float32.

    Args:
        source: the folder, or `OWNER/REPO` on the Hub; see `utils.files.hub.local_folder`.
        tokenizer_weights: a file, or `hf://OWNER/REPO/FILE`; needed if the folder only refers to them.
        device: None: the GPU, or the CPU without one.
        download: further arguments of `huggingface_hub.snapshot_download`, such as revision, token and cache_dir.

    Raises:
        InputError: something is missing or damaged, or the model was trained with a different tokenizer.
    """
    folder = local_folder(source, FILES, **download)
    model = ReAR.from_pretrained(folder)
    tokenizer = _load_exported_tokenizer(folder / TOKENIZER, tokenizer_weights)
    record = read_record(folder / WEIGHTS_FILE)
    trained_with, found = record.get("tokenizer_sha256"), tokenizer.sha256()
    if trained_with not in (None, found):
        raise InputError(
            f"{folder}: trained with the tokenizer of sha256 {trained_with[:12]}..., found {found[:12]}..."
        )
    if untrained := record.get("untrained_classes"):
        warnings.warn(f"{folder}: no training samples of classes {first_of(untrained, 10)}", stacklevel=2)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device), tokenizer.to(device)


def class_names(source: str | Path, **download: Any) -> list[str] | None:
    """Class names of an exported model in the order of their ids; None: unknown. Raises InputError without a folder, or
    for a damaged file."""
    path = local_folder(source, FILES, **download) / CLASSES_FILE
    if not path.is_file():
        return None
    names = read_json(path)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path}: found {str(names)[:40]}, expected a list of texts, the names of the classes")
    return names


def load_generator(path: Path, config: ModelConfig) -> ReAR:
    """The model for sampling, without projectors of any name, whose weights the file may have or not.

    Raises InputError for a missing weights file (see `utils.run.weights_path.find_weights`), or keys or shapes that
    differ from `config`.
    """
    model = ReAR(ReAR.sampling_config(config))
    model.load_weights(path)
    return model


def init_from_weights(model: ReAR, path: Path) -> None:
    """Start fine-tuning: load trained weights, except the embeddings of the classes, which keep their initial values.

    Only the number of classes may differ. Raises InputError for a missing weights file, or other keys or shapes than
    the model's.
    """
    state = load_state_dict(path)
    trained, own = state.get("embeddings.weight"), model.embeddings.weight
    if trained is not None and trained.shape[1:] == own.shape[1:]:
        first_class = model.codebook_size + 1
        classes = own.detach().cpu()[first_class:-1]
        state["embeddings.weight"] = torch.cat([trained[:first_class], classes.to(trained.dtype), trained[-1:]])
    load_strict(model, state, path)


def load_tokenizer(config: Config) -> Tokenizer:
    """The frozen tokenizer of `experiment.tokenizer_checkpoint` in eval mode, on CPU, in float32 (also from
    fp16 files)."""
    vq_model = config.model.vq_model
    tokenizer = build_tokenizer(vq_model)
    if tokenizer.image_seq_len != vq_model.num_latent_tokens:
        raise InputError(
            f"model.vq_model.num_latent_tokens={vq_model.num_latent_tokens}: expected {tokenizer.image_seq_len} "
            f"(codes of shape {tokenizer.code_shape} of model_type={vq_model.model_type})"
        )
    tokenizer.load_weights(local_file(config.experiment.tokenizer_checkpoint))
    return tokenizer.eval().requires_grad_(False)


def _load_exported_tokenizer(folder: Path, weights: str | None) -> Tokenizer:
    tokenizer = build_from_folder(folder, lambda config: build_tokenizer(config.model.vq_model))
    path = folder / WEIGHTS_FILE if weights is None else local_file(weights)
    if weights is None and not path.exists() and (folder / REFERENCE_FILE).is_file():
        reference = read_json(folder / REFERENCE_FILE)
        raise InputError(f"{folder}: found no weights, but a reference to {reference}; give tokenizer_weights=")
    tokenizer.load_weights(path)
    return tokenizer.eval().requires_grad_(False)
