"""Sampling codes: prefill, one-token decoding with a static KV cache, power-cosine guidance.

Legend: B images, N codes per image, S = 2 B or B streams (conditional, then unconditional when guided), D hidden size,
V codebook size.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from modeling.maskgit_vq import MaskGitVQ
from modeling.rear import LayerKVCache, ReAR
from utils.images import to_uint8
from utils.randomness import image_uniforms
from utils.schema import Config, GeneratorConfig


def guidance_schedule(guidance_scale: float, guidance_scale_pow: float, steps: int) -> list[float]:
    """Power-cosine guidance: 1 + (g - 1) * (1 - cos(pi * (k / N) ** pow)) / 2 for step k = 0 .. N - 1.

    Source: MDTv2 (https://arxiv.org/abs/2303.14389), used by RAR and reAR.
    """
    ramp = [(1 - math.cos(math.pi * (k / steps) ** guidance_scale_pow)) / 2 for k in range(steps)]
    return [1 + (guidance_scale - 1) * r for r in ramp]


def guide(cond_logits: Tensor, uncond_logits: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance on logits of any equal shape."""
    return uncond_logits + scale * (cond_logits - uncond_logits)


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set logits (B, V) outside the `top_k` largest (0: off) or outside the nucleus `top_p` (1: off) to -inf."""
    if 0 < top_k < logits.shape[-1]:
        smallest_kept = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        outside = probabilities.cumsum(dim=-1) - probabilities >= top_p  # mass of the likelier codes alone
        logits = logits.masked_fill(outside.scatter(1, order, outside), -math.inf)
    return logits


def sample_codes(logits: Tensor, uniforms: Tensor) -> Tensor:
    """One code per row by the inverse of the cumulative distribution.

    Args:
        logits: (B, V) float32.
        uniforms: (B,) in [0, 1).

    Returns:
        (B,) int64.
    """
    # float64, so that uniform * total < total holds after rounding: the found code exists and has probability > 0.
    cumulative = logits.softmax(dim=-1).double().cumsum(dim=-1)  # (B, V)
    return torch.searchsorted(cumulative, uniforms.double()[:, None] * cumulative[:, -1:], right=True)[:, 0]


@torch.inference_mode()
def generate(
    model: ReAR,
    class_labels: Tensor,
    uniforms: Tensor,
    config: GeneratorConfig,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Sample the codes of images in raster order.

    Args:
        model: in eval mode.
        class_labels: (B,) int64 on the model's device.
        uniforms: (B, N) random numbers, one row per image (`utils.randomness.image_uniforms`): an image depends on
            its own row only, not on the batch it is in.
        config: guidance, temperature, top-k and top-p.
        on_step: called after each code, for a progress bar.

    Returns:
        (B, N) int64 codes.
    """
    guided = config.guidance_scale != 1
    scales = guidance_schedule(config.guidance_scale, config.guidance_scale_pow, model.image_seq_len)
    stream_labels = class_labels
    if guided:
        stream_labels = torch.cat([class_labels, torch.full_like(class_labels, model.num_classes)])  # (S,)
    positions = model.position_table()  # (1, T, D)
    condition = model.condition(stream_labels)  # (S, T, D)
    caches = make_caches(model, len(stream_labels), positions)
    codes = torch.empty(len(class_labels), model.image_seq_len, dtype=torch.int64, device=class_labels.device)

    logits = prefill(model, stream_labels, positions, condition, caches)  # (S, V)
    for k in range(model.image_seq_len):
        if k > 0:
            new_codes = codes[:, k - 1].repeat(2 if guided else 1)  # (S,)
            logits = decode_one_token(model, new_codes, k + 1, positions, condition, caches)
        logits = logits.float()
        if guided:
            logits = guide(*logits.chunk(2), scales[k])  # (B, V)
        logits = filter_logits(logits / config.randomize_temperature, config.top_k, config.top_p)
        codes[:, k] = sample_codes(logits, uniforms[:, k])
        on_step()
    return codes


def make_caches(model: ReAR, streams: int, like: Tensor) -> list[LayerKVCache]:
    """One static cache per block, as long as the sequence, in the device and dtype of `like`."""
    attention = model.blocks[0].attn
    head_size = like.shape[-1] // attention.num_heads
    shape = (streams, attention.num_heads, model.image_seq_len + 1, head_size)  # the last code is never fed back
    return [LayerKVCache(shape, like.device, like.dtype) for _ in model.blocks]


def prefill(
    model: ReAR, class_labels: Tensor, positions: Tensor, condition: Tensor, caches: list[LayerKVCache]
) -> Tensor:
    """Feed [cls, class] and return the logits (S, V) of the first code."""
    return model.step(model.embed_prefix(class_labels) + positions[:, :2], condition[:, :2], caches)


def decode_one_token(
    model: ReAR, codes: Tensor, position: int, positions: Tensor, condition: Tensor, caches: list[LayerKVCache]
) -> Tensor:
    """Feed the codes (S,) that stand at `position` of the sequence and return the logits (S, V) of the next ones."""
    here = slice(position, position + 1)
    return model.step(model.embeddings(codes)[:, None] + positions[:, here], condition[:, here], caches)


@torch.inference_mode()
def generate_images(model: ReAR, tokenizer: MaskGitVQ, indices: list[int], config: Config) -> np.ndarray:
    """The images with these indices; image i has class i mod C and its own random numbers.

    Returns:
        (len(indices), H, W, 3) uint8.
    """
    device = model.cls_token.device
    class_labels = torch.tensor(indices, device=device) % model.num_classes
    uniforms = image_uniforms(config.sampling.seed, indices, model.image_seq_len).to(device)
    codes = generate(model, class_labels, uniforms, config.model.generator)
    # One image at a time: the rounding of a convolution depends on the batch size, and truncation to bytes shows it.
    images = torch.cat([tokenizer.decode(image_codes) for image_codes in codes.split(1)])  # (B, 3, H, W)
    return to_uint8(images, config.sampling.uint8_rule)
