"""From Python: a model and its tokenizer from an exported folder or the Hub, and images of classes.

from modeling.pretrained import generate_images, load_pretrained
from utils.images import save_grid

model, tokenizer = load_pretrained("outputs/rear_b_export")  # or "OWNER/REPO" of the Hugging Face Hub
images = generate_images(model, tokenizer, class_labels=[207, 360, 387, 974], guidance_scale=4.0, seed=0)
save_grid(images, "grid.png")
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from modeling.hub_model import CONFIG_FILE, WEIGHTS_FILE, naming, read_config
from modeling.rear import ReAR
from modeling.sampling.image_sampler import ImageSampler
from modeling.tokenizers.registry import build_tokenizer
from modeling.tokenizers.tokenizer import Tokenizer
from utils.config_checks import check_ranges
from utils.errors import InputError
from utils.files.hub import local_file, local_folder
from utils.files.json_file import read_json
from utils.files.weights import read_record
from utils.precision import matmul_precision
from utils.schema import Config, ModelConfig, SamplingConfig

TOKENIZER = "tokenizer"  # folder below that of the model
REFERENCE_FILE = "reference.json"  # there in place of weights: what they are, and where they were
CLASSES_FILE = "classes.json"  # names of the classes in the order of their ids, as beside shards
FILES = (CONFIG_FILE, WEIGHTS_FILE, CLASSES_FILE, f"{TOKENIZER}/*.json", f"{TOKENIZER}/{WEIGHTS_FILE}")


def load_pretrained(
    source: str | Path,
    tokenizer_weights: str | None = None,
    device: str | torch.device | None = None,
    **download: Any,
) -> tuple[ReAR, Tokenizer]:
    """The model and the tokenizer of a folder that `scripts/export_model.py` wrote, in eval mode and float32.

    Args:
        source: the folder, or `OWNER/REPO` on the Hub; see `utils.files.hub.local_folder`.
        tokenizer_weights: a file, or `hf://OWNER/REPO/FILE`; needed where the folder only refers to them.
        device: None: the GPU if there is one.
        download: further arguments of `huggingface_hub.snapshot_download`, as revision, token and cache_dir.

    Raises:
        InputError: something is missing or damaged, or model and tokenizer do not belong together.
    """
    folder = local_folder(source, FILES, **download)
    model = ReAR.from_pretrained(folder)
    tokenizer = load_pretrained_tokenizer(folder / TOKENIZER, tokenizer_weights)
    trained_with = read_record(folder / WEIGHTS_FILE).get("tokenizer_sha256")
    if trained_with not in (None, found := tokenizer.sha256()):
        raise InputError(
            f"{folder}: trained on codes of the tokenizer of sha256 {trained_with[:12]}..., found {found[:12]}..."
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device), tokenizer.to(device)


def load_pretrained_tokenizer(folder: Path, weights: str | None = None) -> Tokenizer:
    """The frozen tokenizer of a folder, of the kind that its config.json names; arguments as for `load_pretrained`.

    Raises:
        InputError: a file that is missing or damaged or does not fit.
    """
    config = read_config(folder)
    with naming(folder / CONFIG_FILE):
        tokenizer = build_tokenizer(config.model.vq_model)
    if weights is None and not (folder / WEIGHTS_FILE).exists() and (folder / REFERENCE_FILE).is_file():
        reference = read_json(folder / REFERENCE_FILE)
        raise InputError(f"{folder}: holds no weights, and refers to {reference}; give tokenizer_weights=")
    tokenizer.load_weights(folder / WEIGHTS_FILE if weights is None else local_file(weights))
    return tokenizer.eval().requires_grad_(False)


def class_names(source: str | Path, **download: Any) -> list[str] | None:
    """Names of the classes of an exported model, in the order of their ids; None: they are not known.

    Raises:
        InputError: no folder, or one with a damaged file.
    """
    path = local_folder(source, FILES, **download) / CLASSES_FILE
    return [str(name) for name in read_json(path)] if path.is_file() else None


def generate_images(
    model: ReAR,
    tokenizer: Tokenizer,
    class_labels: Sequence[int] | Tensor,
    *,
    guidance_scale: float | None = None,
    guidance_scale_pow: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 42,
    order: Literal["raster", "random"] = "raster",
    batch_size: int = 50,
    sampler: ImageSampler | None = None,
) -> np.ndarray:
    """Images of these classes, as scripts/sample_imagenet_rear.py makes them: in bf16 and with CUDA graphs on a GPU, in
    float32 on a CPU. Image i depends on (weights, settings, seed, i, its class) only; with labels 0, 1, .., C - 1, 0,
    1, .. it is that of the script.

    Args:
        model, tokenizer: on the same device, in eval mode.
        class_labels: (n,) from 0 to C - 1, or `model.null_class`.
        guidance_scale, guidance_scale_pow, temperature, top_k, top_p: None: what `model.config.generator` says.
        order: random: for models that were trained so.
        batch_size: images at a time.
        sampler: one of this model to use again, with its own batch size, as on a GPU a new one takes seconds:
            `ImageSampler(model, tokenizer, Config(model=model.config), batch_size)`.

    Returns:
        (n, H, W, 3) uint8; codes (n, N) uint16 of a tokenizer without images.

    Raises:
        ValueError: no labels, or an argument outside its range.
        NonFiniteError: logits or pixels that are not finite.
    """
    labels = torch.as_tensor(class_labels).cpu()
    if len(labels) == 0:
        raise ValueError("class_labels=[]: expected at least one")
    settings = (guidance_scale, guidance_scale_pow, temperature, top_k, top_p)
    config = with_settings(model, settings, SamplingConfig(seed=seed, order=order))
    if sampler is None:
        sampler = ImageSampler(model, tokenizer, config, min(batch_size, len(labels)))
    if sampler.model is not model:
        raise ValueError("sampler: of another model, expected one of the model that is given")
    sampler.configure(config)
    batches = torch.arange(len(labels)).split(sampler.batch_size)
    steps = len(batches) * model.image_seq_len
    with matmul_precision(tf32=True), tqdm(desc="sampling", total=steps, unit="code", delay=1) as progress:
        return np.concatenate([sampler(rows.tolist(), labels[rows], progress.update) for rows in batches])


def with_settings(model: ReAR, settings: tuple[float | None, ...], sampling: SamplingConfig) -> Config:
    """The sampling of a model by its own config, but for the `settings` that are given.

    Raises:
        ConfigError: a value outside its range.
    """
    names = ("guidance_scale", "guidance_scale_pow", "randomize_temperature", "top_k", "top_p")
    given: dict[str, Any] = {name: value for name, value in zip(names, settings, strict=True) if value is not None}
    config = Config(model=ModelConfig(generator=replace(model.config.generator, **given)), sampling=sampling)
    check_ranges(config.model.generator, "model.generator.")
    check_ranges(config.sampling, "sampling.")
    return config
