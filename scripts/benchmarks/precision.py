"""Gate for bf16 decoding: teacher-forced likelihood and likeliest codes of a trained model against float32.

Takes a config as the sampler does; the codes are the first of `dataset.params.pretokenization`.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.codes.token_store import open_tokens
from modeling.rear import ReAR, load_generator
from modeling.sampling.cached_decoding import BUCKET, DecodingState, decode_one_token, prefill
from scripts.benchmarks.measure import device
from utils.config import Config, load_config
from utils.errors import InputError
from utils.run.trained_weights import find_trained_weights

MAX_NLL_DIFFERENCE, MIN_AGREEMENT = 1e-3, 0.995


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=64, help="code sequences")
    parser.add_argument("overrides", nargs="+", metavar="key=value", help="config=... and other keys, as the sampler's")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """
    Raises:
        InputError: bf16 misses a limit.
    """
    config = load_config(["experiment.output_dir=unused", *arguments.overrides])
    weights, store_path = config.experiment.generator_checkpoint, config.dataset.params.pretokenization
    if weights is None or store_path is None:
        key = "experiment.generator_checkpoint" if weights is None else "dataset.params.pretokenization"
        raise InputError(f"{key}: missing, expected a path")
    model = load_generator(find_trained_weights(weights).path, config.model).to(device()).eval()
    class_labels, codes = read_codes(Path(store_path), config, arguments.images)
    exact, rounded = (teacher_forced(model, class_labels, codes, dtype) for dtype in (torch.float32, torch.bfloat16))
    nll, nll_bf16 = (F.cross_entropy(logits.flatten(0, 1), codes.flatten()).item() for logits in (exact, rounded))
    figures = {
        "nll": nll,
        "nll_bf16": nll_bf16,
        "nll_difference": abs(nll - nll_bf16),
        "argmax_agreement": (exact.argmax(-1) == rounded.argmax(-1)).double().mean().item(),
        "codes": codes.numel(),
    }
    print(", ".join(f"{name} {value:.6g}" for name, value in figures.items()))
    if figures["nll_difference"] > MAX_NLL_DIFFERENCE or figures["argmax_agreement"] < MIN_AGREEMENT:
        raise InputError(
            f"gate: {figures}, expected a difference <= {MAX_NLL_DIFFERENCE}, agreement >= {MIN_AGREEMENT}"
        )
    return figures


def read_codes(path: Path, config: Config, images: int) -> tuple[Tensor, Tensor]:
    """Class labels (B,) and codes (B, N), int64."""
    generator = config.model.generator
    store = open_tokens(
        path,
        config.model.vq_model.codebook_size,
        generator.image_seq_len,
        generator.condition_num_classes,
    )
    batch = store.__getitems__(range(min(images, len(store))))
    return batch["class_labels"].to(device()), batch["codes"].long().to(device())


@torch.inference_mode()
def teacher_forced(model: ReAR, class_labels: Tensor, codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits (B, N, V) of decoding with given codes, step by step through the cache."""
    state = DecodingState(model, len(codes), guided=False, dtype=dtype)
    state.start(class_labels, torch.zeros(codes.shape))
    state.codes.copy_(codes)
    state.fill_modulations(0)
    hidden = [prefill(state)]
    for position in range(2, codes.shape[1] + 1):
        if position % BUCKET == 0:
            state.fill_modulations(position)
        state.position.add_(1)
        hidden.append(decode_one_token(state, end=position + 1, masked=False))
    return model.lm_head(torch.stack(hidden, dim=1))
