"""Other ways to decode the same model, restated for comparison; their codes are those of `modeling.sampling.generate`.

- no cache, the published algorithm: every step runs the whole prefix, conditional and unconditional, through the
  network, with adaLN per row and position, position tables repeated per row and gathered by the order of the codes, a
  dense float mask, and the head over all positions;
- concatenating cache: the same step, but keys and values of earlier positions are kept and grown with `torch.cat`, and
  of the inputs, made as before, only the newest position goes through the network;
- lean concatenating cache: and nothing but the newest position's input is made, from one table of positions.

Legend: B images, N codes per image, S = 2 B sequences, t positions of a step, D hidden size, H heads, d = D / H.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from modeling.blocks import Block
from modeling.rear import ReAR
from modeling.sampling.generate import guidance_schedule, guide, sample_codes
from utils.schema import GeneratorConfig

Cache = dict[Block, tuple[Tensor, Tensor]]


@torch.inference_mode()
def generate_no_cache(model: ReAR, class_labels: Tensor, uniforms: Tensor, config: GeneratorConfig) -> Tensor:
    """Codes (B, N) of class labels (B,) and uniforms (B, N); temperature, guidance, no top-k and top-p."""
    return _generate(model, class_labels, uniforms, config, cache=None)


@torch.inference_mode()
def generate_concatenating(model: ReAR, class_labels: Tensor, uniforms: Tensor, config: GeneratorConfig) -> Tensor:
    """The same with keys and values concatenated step by step."""
    return _generate(model, class_labels, uniforms, config, cache={})


@torch.inference_mode()
def generate_lean_concatenating(model: ReAR, class_labels: Tensor, uniforms: Tensor, config: GeneratorConfig) -> Tensor:
    """The same with the inputs of the newest position only."""
    return _generate(model, class_labels, uniforms, config, cache={}, table=model.position_table())


def _generate(
    model: ReAR,
    class_labels: Tensor,
    uniforms: Tensor,
    config: GeneratorConfig,
    cache: Cache | None,
    table: Tensor | None = None,  # (1, T, D)
) -> Tensor:
    scales = guidance_schedule(config.guidance_scale, config.guidance_scale_pow, model.image_seq_len)
    streams = torch.cat([class_labels, torch.full_like(class_labels, model.num_classes)])  # (S,)
    codes = torch.empty(len(class_labels), 0, dtype=torch.int64, device=class_labels.device)
    for k in range(model.image_seq_len):
        if cache and table is not None:
            x, condition = _newest_inputs(model, streams, codes.repeat(2, 1), table)
        else:
            x, condition = published_inputs(model, streams, codes.repeat(2, 1))
        if cache:
            x, condition = x[:, -1:], condition[:, -1:]
        logits = _last_logits(model, x, condition, cache).float()
        cond, uncond = logits.chunk(2)
        logits = guide(cond, uncond, scales[k]) / config.randomize_temperature  # (B, V)
        codes = torch.cat([codes, sample_codes(logits, uniforms[:, k])[:, None]], dim=1)
    return codes


def published_inputs(model: ReAR, class_labels: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings and adaLN conditions, each (S, k + 2, D), of the prefix of `codes` (S, k)."""
    length = codes.shape[1] + 2
    x = torch.cat([model.embed_prefix(class_labels), model.embeddings(codes)], dim=1)
    condition = _class_embedding(model, class_labels) + model.timesteps_embeddings[:, :length]
    return x + _positions(model, class_labels, length), condition


def _newest_inputs(model: ReAR, class_labels: Tensor, codes: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The last position of `published_inputs`, (S, 1, D) each."""
    here = slice(codes.shape[1] + 1, codes.shape[1] + 2)
    condition = _class_embedding(model, class_labels) + model.timesteps_embeddings[:, here]
    return model.embeddings(codes[:, -1:]) + table[:, here], condition


def _class_embedding(model: ReAR, class_labels: Tensor) -> Tensor:
    return model.embeddings(model.codebook_size + 1 + class_labels)[:, None]  # (S, 1, D)


def _last_logits(model: ReAR, x: Tensor, condition: Tensor, cache: Cache | None) -> Tensor:
    """Logits (S, V) of the next code."""
    mask = torch.full((x.shape[1], x.shape[1]), -math.inf, device=x.device, dtype=x.dtype).triu(1)
    for block in model.blocks:
        x = _block(cast(Block, block), x, condition, mask, cache)
    scale, shift = model.adaln_before_head.adaLN_modulation(F.silu(condition)).chunk(2, dim=-1)
    x = modulate(model.adaln_before_head.norm_final(x), shift, scale)
    return model.lm_head(x)[:, -1]


def _positions(model: ReAR, class_labels: Tensor, length: int) -> Tensor:
    """Both position tables, repeated per row and gathered in raster order: (S, length, D)."""
    order = torch.arange(2, model.image_seq_len + 2, device=class_labels.device).repeat(len(class_labels), 1)  # (S, N)
    own = model.pos_embed.repeat(len(class_labels), 1, 1)
    target = model.target_aware_pos_embed.repeat(len(class_labels), 1, 1)
    index = order[..., None].expand(-1, -1, own.shape[-1])  # (S, N, D)
    own = torch.cat([own[:, :2], own.gather(1, index)], dim=1)  # (S, N + 2, D)
    target = torch.cat([torch.zeros_like(target[:, :1]), target.gather(1, index), torch.zeros_like(target[:, :1])], 1)
    return (own + target)[:, :length]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def _block(block: Block, x: Tensor, condition: Tensor, mask: Tensor, cache: Cache | None) -> Tensor:
    modulation = block.adaLN_modulation(F.silu(condition))  # (S, t, 6 D)
    shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
    attention = block.attn
    heads = attention.qkv(modulate(block.norm1(x), shift_attn, scale_attn))
    q, k, v = rearrange(heads, "s t (three h d) -> three s h t d", three=3, h=attention.num_heads)
    q, k = attention.q_norm(q), attention.k_norm(k)
    if cache is not None:
        if block in cache:
            k, v = torch.cat([cache[block][0], k], dim=2), torch.cat([cache[block][1], v], dim=2)
        cache[block] = k, v
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask if q.shape[2] > 1 else None)
    x = x + gate_attn * attention.proj(rearrange(attended, "s h t d -> s t (h d)"))
    return x + gate_mlp * block.mlp(modulate(block.norm2(x), shift_mlp, scale_mlp))
