"""The published network, sampling and training loss, restated for comparison on the same weights.

The published network repeats the position tables per row and gathers them by the order of the tokens, computes SiLU
and adaLN per row and position in every block, and masks attention with a dense float tensor.

Sampling, three methods that give the same codes as `modeling.sampling.generate`:
- no cache, the published sampler: each step runs the whole prefix, conditional and unconditional, with the head over
  all positions;
- concatenating cache: the inputs are computed as before, but only the newest position goes through the network, and
  keys and values grow by `torch.cat`;
- lean concatenating cache: also, only the newest position's input is computed.

Training: normalized codebook vectors of every token, a float32 copy of all logits, and four `.item()` per step.

Legend: B images, N codes per image, S = 2 B sequences with guidance, T positions, D hidden size.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from modeling.blocks import Block
from modeling.perturbation import perturb
from modeling.rear import ReAR
from modeling.sampling.generate import guidance_schedule, guide, sample_codes
from modeling.taps import projector_name
from modeling.tokenizers.tokenizer import Tokenizer
from utils.precision import autocast
from utils.schema import Config, GeneratorConfig

Cache = dict[Block, tuple[Tensor, Tensor]]  # keys and values (S, H, t, d) of each block
BlockFunction = Callable[[Block, Tensor, Tensor, Tensor], Tensor]


@torch.inference_mode()
def generate_published(
    model: ReAR,
    class_labels: Tensor,
    uniforms: Tensor,
    config: GeneratorConfig,
    cached: bool = False,
    lean: bool = False,
) -> Tensor:
    """Codes (B, N) for class labels (B,) and uniforms (B, N), in raster order; without top-k and top-p.

    Args:
        cached: keep keys and values of earlier positions.
        lean: with the cache, make only the newest position's input.
    """
    cache: Cache | None = {} if cached else None
    table = model.position_table()  # (1, T, D)
    scales = guidance_schedule(config.guidance_scale, config.guidance_scale_pow, model.image_seq_len)
    labels = torch.cat([class_labels, torch.full_like(class_labels, model.num_classes)])  # (S,)
    codes = torch.empty(len(class_labels), 0, dtype=torch.int64, device=class_labels.device)
    for k in range(model.image_seq_len):
        if cache and lean:
            x, condition = _newest_inputs(model, labels, codes.repeat(2, 1), table)
        else:
            x, condition = _inputs(model, labels, codes.repeat(2, 1))
        if cache:  # filled by the first step, which runs all positions
            x, condition = x[:, -1:], condition[:, -1:]
        mask = _causal_mask(x)
        for block in model.blocks:
            x = published_block(cast(Block, block), x, condition, mask, cache)
        cond, uncond = _logits(model, x, condition)[:, -1].float().chunk(2)
        logits = guide(cond, uncond, scales[k]) / config.randomize_temperature  # (B, V)
        codes = torch.cat([codes, sample_codes(logits, uniforms[:, k])[:, None]], dim=1)
    return codes


BASELINES: dict[str, Callable[[ReAR, Tensor, Tensor, GeneratorConfig], Tensor]] = {
    "no_cache": generate_published,
    "concat_cache": partial(generate_published, cached=True),
    "lean_concat_cache": partial(generate_published, cached=True, lean=True),
}


def published_loss(
    model: ReAR,
    tokenizer: Tokenizer,
    batch: dict[str, Tensor],
    max_ratio: float,
    config: Config,
    block_function: BlockFunction,
) -> Tensor:
    """The loss of a batch; all arguments but the last as for `modeling.training_step.training_step`.

    Args:
        block_function: `published_block`, or a compiled one.
    """
    generator, codes = config.model.generator, batch["codes"]
    context, mask = perturb(codes, batch["perturbation_uniforms"], max_ratio, config.model)
    targets = tokenizer.codebook_lookup(codes)  # (B, N, Z)
    labels = batch["class_labels"][batch["class_rows"]]  # (B,)
    with autocast(config.training, codes.device):
        logits, encode_z, decode_z = _training_forward(model, labels, context, block_function)
    encode = -(F.normalize(encode_z.float(), dim=-1) * F.normalize(targets.float(), dim=-1)).sum(-1)
    decode = -(F.normalize(decode_z.float(), dim=-1) * F.normalize(targets.float(), dim=-1)).sum(-1)
    ar_loss = F.cross_entropy(logits.float().flatten(0, 1), codes.flatten().long())
    proj_loss = (encode * ~mask).mean() + decode.mean()
    loss = ar_loss + generator.transition_alignment_weight * proj_loss
    correct = (logits.argmax(dim=-1) == codes).float().mean()
    for number in (loss, ar_loss, proj_loss, correct):
        number.item()
    return loss


def _training_forward(
    model: ReAR, labels: Tensor, codes: Tensor, block_function: BlockFunction
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, N, V) and both projections (B, N, Z)."""
    encode, decode = model.taps
    x, condition = _inputs(model, labels, codes)  # each (B, T, D)
    mask = _causal_mask(x)
    for layer, block in enumerate(model.blocks):
        x = block_function(cast(Block, block), x, condition, mask)
        if layer == encode.block:
            encode_z = model.get_submodule(projector_name(encode))(x[:, 2:])
        if layer == decode.block:
            decode_z = model.get_submodule(projector_name(decode))(x[:, 1:-1])
    return _logits(model, x, condition)[:, 1:-1], encode_z, decode_z


def published_block(block: Block, x: Tensor, condition: Tensor, mask: Tensor, cache: Cache | None = None) -> Tensor:
    """x, condition (S, t, D); mask (t, t). With a cache, x follows the positions in it."""
    modulation = block.adaLN_modulation(F.silu(condition))  # (S, t, 6 D)
    shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
    attention = block.attn
    heads = attention.qkv(modulate(block.norm1(x), shift_attn, scale_attn))
    q, k, v = rearrange(heads, "s t (three h d) -> three s h t d", three=3, h=attention.num_heads)
    q, k = attention.q_norm(q).to(v.dtype), attention.k_norm(k).to(v.dtype)
    if cache is not None:
        if block in cache:
            keys, values = cache[block]
            k, v = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
        cache[block] = k, v
    dropout = attention.attn_drop if block.training else 0.0
    dense_mask = mask.to(q.dtype) if q.shape[2] > 1 else None  # a single newest position attends to all
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=dense_mask, dropout_p=dropout)
    x = x + gate_attn * attention.proj_drop(attention.proj(rearrange(attended, "s h t d -> s t (h d)")))
    return x + gate_mlp * block.mlp(modulate(block.norm2(x), shift_mlp, scale_mlp))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def _logits(model: ReAR, x: Tensor, condition: Tensor) -> Tensor:
    """Logits of all positions, (S, t, V)."""
    scale, shift = model.adaln_before_head.adaLN_modulation(F.silu(condition)).chunk(2, dim=-1)
    return model.lm_head(modulate(model.adaln_before_head.norm_final(x), shift, scale))


def _causal_mask(x: Tensor) -> Tensor:
    return torch.full((x.shape[1], x.shape[1]), -math.inf, device=x.device, dtype=x.dtype).triu(1)


def _inputs(model: ReAR, class_labels: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings and adaLN conditions, each (S, k + 2, D), of the prefix of `codes` (S, k)."""
    length = codes.shape[1] + 2
    x = torch.cat([model.embed_prefix(class_labels), model.embeddings(codes)], dim=1)
    condition = _class_embedding(model, class_labels) + model.timesteps_embeddings[:, :length]
    return x + _positions(model, class_labels, length), condition


def _newest_inputs(model: ReAR, class_labels: Tensor, codes: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The last position of `_inputs`, (S, 1, D) each."""
    newest = slice(codes.shape[1] + 1, codes.shape[1] + 2)
    condition = _class_embedding(model, class_labels) + model.timesteps_embeddings[:, newest]
    return model.embeddings(codes[:, -1:]) + table[:, newest], condition


def _class_embedding(model: ReAR, class_labels: Tensor) -> Tensor:
    return model.embeddings(model.codebook_size + 1 + class_labels)[:, None]  # (S, 1, D)


def _positions(model: ReAR, class_labels: Tensor, length: int) -> Tensor:
    """Both position tables, repeated per row and gathered in raster order: (S, length, D)."""
    order = torch.arange(2, model.image_seq_len + 2, device=class_labels.device).repeat(len(class_labels), 1)  # (S, N)
    own = model.pos_embed.repeat(len(class_labels), 1, 1)
    target = model.target_aware_pos_embed.repeat(len(class_labels), 1, 1)
    index = order[..., None].expand(-1, -1, own.shape[-1])  # (S, N, D)
    own = torch.cat([own[:, :2], own.gather(1, index)], dim=1)  # (S, N + 2, D)
    target = torch.cat([torch.zeros_like(target[:, :1]), target.gather(1, index), torch.zeros_like(target[:, :1])], 1)
    return (own + target)[:, :length]
