"""The parts of the generator: blocks with adaLN.

Images of the same class have the same adaLN modulations, so these are computed once for each of U distinct labels;
`rows` tells which of them an image has.

Legend: B images, T positions, D hidden size, H heads, d = D / H, U distinct labels.
"""

from collections import OrderedDict
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Attention(nn.Module):
    """Causal self-attention with LayerNorm on queries and keys per head."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float, attn_drop: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = nn.LayerNorm(hidden_size // num_heads, eps=1e-6)
        self.k_norm = nn.LayerNorm(hidden_size // num_heads, eps=1e-6)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.num_heads)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)  # under autocast a norm returns float32
        dropout = self.attn_drop if self.training else 0.0
        # is_causal instead of a mask keeps the flash kernel.
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # (B, H, T, d)
        return self.proj_drop(self.proj(rearrange(x, "b h t d -> b t (h d)")))


def mlp(size: int, hidden_size: int, dropout: float) -> nn.Sequential:
    """With the names of timm's Mlp in the state dict; importing timm takes longer than all else at the start."""
    layers = {
        "fc1": nn.Linear(size, hidden_size),
        "act": nn.GELU(),
        "drop1": nn.Dropout(dropout),
        "fc2": nn.Linear(hidden_size, size),
        "drop2": nn.Dropout(dropout),
    }
    return nn.Sequential(OrderedDict(layers))


class GatherRows(torch.autograd.Function):
    """`table[rows]` of a table (U, ...) and rows (B,).

    Its gradient sums over the images of a row by a matrix product, which is fast and has the same bits each time.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.num_rows = len(table)
        return table.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        # Not F.one_hot, for whose U the compiled block would be compiled again; and the sum in grad's own type, for a
        # compiled block takes the autocast of the forward pass along.
        members = (rows[:, None] == torch.arange(ctx.num_rows, device=rows.device)).to(grad.dtype)  # (B, U)
        with torch.autocast(grad.device.type, enabled=False):
            return (members.mT @ grad.flatten(1)).unflatten(1, grad.shape[1:]), None


def gather_rows(table: Tensor, rows: Tensor | None) -> Tensor:
    """Each image's row, (B, ...), of a table (U, ...); without `rows` image i has row i."""
    return table if rows is None else cast(Tensor, GatherRows.apply(table, rows))


def norm_and_modulate(x: Tensor, norm: nn.LayerNorm, shift: Tensor, scale: Tensor, rows: Tensor | None) -> Tensor:
    """`norm(x) * (1 + scale) + shift` of x (B, t, D); shift and scale (U, t, D).

    The affine part of the norm is put into shift and scale, of which there are fewer.
    """
    scale = 1 + scale
    if norm.elementwise_affine:
        shift, scale = shift + norm.bias * scale, norm.weight * scale
    normed = F.layer_norm(x, norm.normalized_shape, eps=norm.eps)
    return torch.addcmul(gather_rows(shift, rows), normed, gather_rows(scale, rows))


class Block(nn.Module):
    """Pre-norm transformer block with adaLN-zero (DiT, https://arxiv.org/abs/2212.09748)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_size: int, dropout: float, attn_drop: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, dropout, attn_drop)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.mlp = mlp(hidden_size, mlp_size, dropout)
        self.adaLN_modulation = adaln_linear(hidden_size, 6)

    def forward(self, x: Tensor, condition: Tensor, rows: Tensor | None) -> Tensor:
        modulation = self.adaLN_modulation(condition)  # (U, T, 6 D)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        attended = self.attn(norm_and_modulate(x, self.norm1, shift_attn, scale_attn, rows))
        x = torch.addcmul(x, gather_rows(gate_attn, rows), attended)
        hidden = self.mlp(norm_and_modulate(x, self.norm2, shift_mlp, scale_mlp, rows))
        return torch.addcmul(x, gather_rows(gate_mlp, rows), hidden)


class FinalLayer(nn.Module):
    """Final norm without affine parameters, modulated; its chunk order is scale, shift, unlike the blocks'."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.adaLN_modulation = adaln_linear(hidden_size, 2)

    def forward(self, x: Tensor, condition: Tensor, rows: Tensor | None) -> Tensor:
        scale, shift = self.adaLN_modulation(condition).chunk(2, dim=-1)  # each (U, t, D)
        return norm_and_modulate(x, self.norm_final, shift, scale, rows)


def adaln_linear(hidden_size: int, outputs: int) -> nn.Sequential:
    """Linear D -> outputs * D. Its SiLU is the same in every block, so `condition` comes with it applied;
    the Identity holds its place in the published keys (`adaLN_modulation.1`)."""
    return nn.Sequential(nn.Identity(), nn.Linear(hidden_size, outputs * hidden_size))
