"""The published training step, restated for comparison: the same loss of the same weights.

- position tables repeated per image and gathered by the order of the codes, a dense float mask, SiLU and adaLN per
  image and position in every block; the block is compiled, as it is released;
- normalised codebook vectors of every code, a float32 copy of all logits, and four numbers that the host waits for;
- AdamW that is not fused.

Legend as in `modeling/rear.py`.
"""

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from modeling.blocks import Block
from modeling.perturbation import perturb
from modeling.rear import ReAR
from modeling.tokenizers.tokenizer import Tokenizer
from scripts.benchmarks.baselines import modulate, published_inputs
from utils.precision import autocast
from utils.schema import Config

BlockFunction = Callable[[Block, Tensor, Tensor, Tensor], Tensor]


def published_loss(
    model: ReAR,
    tokenizer: Tokenizer,
    batch: dict[str, Tensor],
    max_ratio: float,
    config: Config,
    block_function: BlockFunction,
) -> Tensor:
    """The loss of a batch as `modeling.training_step.training_step` gets it."""
    generator, codes = config.model.generator, batch["codes"]
    context, mask = perturb(codes, batch["perturbation_uniforms"], max_ratio, config.model)
    targets = tokenizer.codebook_lookup(codes)  # (B, N, Z)
    labels = batch["class_labels"][batch["class_rows"]]  # (B,)
    with autocast(config.training, codes.device):
        logits, encode_z, decode_z = _forward(model, labels, context, block_function)
    encode, decode = (-(F.normalize(z.float(), dim=-1) * F.normalize(targets.float(), dim=-1)).sum(-1)
                      for z in (encode_z, decode_z))  # fmt: skip
    ar_loss = F.cross_entropy(logits.float().flatten(0, 1), codes.flatten().long())
    proj_loss = (encode * ~mask).mean() + decode.mean()
    loss = ar_loss + generator.transition_alignment_weight * proj_loss
    correct = (logits.argmax(dim=-1) == codes).float().mean()
    for number in (loss, ar_loss, proj_loss, correct):
        number.item()
    return loss


def _forward(
    model: ReAR, labels: Tensor, codes: Tensor, block_function: BlockFunction
) -> tuple[Tensor, Tensor, Tensor]:
    assert model.encode_align_mlp is not None
    assert model.decode_align_mlp is not None
    x, condition = published_inputs(model, labels, codes)  # each (B, T, D)
    mask = torch.full((x.shape[1], x.shape[1]), -math.inf, device=x.device, dtype=x.dtype).triu(1)
    for layer, block in enumerate(model.blocks):
        x = block_function(cast(Block, block), x, condition, mask)
        if layer == model.encode_align_layer:
            encode_z = model.encode_align_mlp(x[:, 2:])
        if layer == model.decode_align_layer:
            decode_z = model.decode_align_mlp(x[:, 1:-1])
    scale, shift = model.adaln_before_head.adaLN_modulation(F.silu(condition)).chunk(2, dim=-1)
    x = modulate(model.adaln_before_head.norm_final(x), shift, scale)
    return model.lm_head(x)[:, 1:-1], encode_z, decode_z


def published_block(block: Block, x: Tensor, condition: Tensor, mask: Tensor) -> Tensor:
    modulation = block.adaLN_modulation(F.silu(condition))  # (B, T, 6 D)
    shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
    attention = block.attn
    heads = attention.qkv(modulate(block.norm1(x), shift_attn, scale_attn))
    q, k, v = rearrange(heads, "b t (three h d) -> three b h t d", three=3, h=attention.num_heads)
    q, k = attention.q_norm(q).to(v.dtype), attention.k_norm(k).to(v.dtype)
    dropout = attention.attn_drop if block.training else 0.0
    attended = F.scaled_dot_product_attention(q, k, v, mask.to(q.dtype), dropout)
    x = x + gate_attn * attention.proj_drop(attention.proj(rearrange(attended, "b h t d -> b t (h d)")))
    return x + gate_mlp * block.mlp(modulate(block.norm2(x), shift_mlp, scale_mlp))
