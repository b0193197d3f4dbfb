"""The transformer block with adaLN, for training and for cached decoding.

Training calls `Block.forward`. Cached decoding (`modeling/sampling/cached_decoding.py`) calls the same halves,
`before_attention` and `after_attention`, with a KV cache between them and modulations computed in advance.

Images of one class share their modulations, which are computed once for each of the U distinct labels of a batch;
`rows` (B,) maps an image to its label.

Legend: B images, t positions, D hidden size, H heads, d = D / H, U distinct labels.
"""

import math
from collections import OrderedDict
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6
SCORES_AT_ONCE = 2**20  # of `CausalAttentionOnCpu`: 4 MB


class GatherRows(torch.autograd.Function):
    """`table[rows]` whose gradient sums over equal rows by a matrix product: fast, and deterministic."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.num_rows = len(table)
        return table.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        # Not F.one_hot: it would recompile a compiled block for each U. In grad's dtype and without autocast: a
        # compiled block runs its backward pass under the autocast of the forward pass.
        one_hot = (rows[:, None] == torch.arange(ctx.num_rows, device=rows.device)).to(grad.dtype)  # (B, U)
        with torch.autocast(grad.device.type, enabled=False):
            return (one_hot.mT @ grad.flatten(1)).unflatten(1, grad.shape[1:]), None


def gather_rows(table: Tensor, rows: Tensor | None) -> Tensor:
    """(B, ...) rows of a table (U, ...); `rows` None: row i for image i."""
    if rows is None:
        return table
    if not table.requires_grad:
        return table.index_select(0, rows)
    return cast(Tensor, GatherRows.apply(table, rows))


class BlockModulation(NamedTuple):
    """adaLN outputs of a block, (U, t, D) each, with the norms' affine parameters folded in; `scale_*` is 1 + scale."""

    shift_attn: Tensor
    scale_attn: Tensor
    gate_attn: Tensor
    shift_mlp: Tensor
    scale_mlp: Tensor
    gate_mlp: Tensor


def fold_norm(norm: nn.LayerNorm, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(shift, scale) for `modulate`, such that it computes `norm(x) * (1 + scale) + shift`."""
    scale = 1 + scale
    if norm.elementwise_affine:
        shift, scale = shift + norm.bias * scale, norm.weight * scale
    return shift, scale


def modulate(x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None) -> Tensor:
    """Normalize x (B, t, D), then scale and shift it, both (U, t, D)."""
    normed = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
    return torch.addcmul(gather_rows(shift, rows), normed, gather_rows(scale, rows))


def adaln_linear(hidden_size: int, outputs: int) -> nn.Sequential:
    """Linear D -> outputs * D. `ReAR.condition` applies the SiLU; the Identity keeps the key `adaLN_modulation.1`."""
    return nn.Sequential(nn.Identity(), nn.Linear(hidden_size, outputs * hidden_size))


class CausalAttentionOnCpu(torch.autograd.Function):
    """`F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)` in float32, bit for bit.

    A few images at a time, whose scores stay in the processor's cache: with dropout, torch writes all of them to memory
    in each operation. For the backward pass it saves the probabilities and a bool mask instead of three float tensors.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        """(B, H, t, d), as the arguments."""
        images, heads, length, width = q.shape
        ctx.scale = math.sqrt(1 / math.sqrt(width))  # of queries and of keys, as in torch
        ctx.kept_scale = torch.ones(()).div_(1 - dropout).item()
        ctx.images_at_once = max(1, SCORES_AT_ONCE // (heads * length**2))
        kept = torch.empty(images, heads, length, length, dtype=torch.bool).bernoulli_(1 - dropout)
        future = torch.full((length, length), -math.inf).triu_(1)
        probabilities, attended = torch.empty(kept.shape), torch.empty(q.shape)
        for start in range(0, images, ctx.images_at_once):
            part = slice(start, start + ctx.images_at_once)
            keys = (k[part].mT * ctx.scale).flatten(0, 1)
            scores = (q[part] * ctx.scale).flatten(0, 1).bmm(keys).add_(future)
            torch.softmax(scores, dim=-1, out=probabilities[part].flatten(0, 1))
            dropped = (probabilities[part] * kept[part]).mul_(ctx.kept_scale)
            torch.bmm(dropped.flatten(0, 1), v[part].flatten(0, 1), out=attended[part].flatten(0, 1))
        ctx.save_for_backward(q, k, v, probabilities, kept)
        return attended

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, all_probabilities, all_kept = ctx.saved_tensors
        q_grad, k_grad, v_grad = (torch.empty(q.shape) for _ in range(3))
        for start in range(0, len(q), ctx.images_at_once):
            part = slice(start, start + ctx.images_at_once)
            probabilities, kept = all_probabilities[part].flatten(0, 1), all_kept[part].flatten(0, 1)
            dropped = (probabilities * kept).mul_(ctx.kept_scale)
            out_grad = grad[part].flatten(0, 1)
            torch.bmm(dropped.mT, out_grad, out=v_grad[part].flatten(0, 1))
            probabilities_grad = out_grad.bmm(v[part].flatten(0, 1).mT).mul_(kept).mul_(ctx.kept_scale)
            scores_grad = torch._softmax_backward_data(probabilities_grad, probabilities, -1, torch.float32)
            torch.bmm(scores_grad, (k[part] * ctx.scale).flatten(0, 1), out=q_grad[part].flatten(0, 1))
            k_grad[part] = (q[part] * ctx.scale).flatten(0, 1).mT.bmm(scores_grad).mT.view_as(k_grad[part])
        return q_grad.mul_(ctx.scale), k_grad.mul_(ctx.scale), v_grad, None


class Attention(nn.Module):
    """Causal self-attention with LayerNorm on the queries and keys of each head."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float, attn_drop: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = nn.LayerNorm(hidden_size // num_heads, eps=NORM_EPS)
        self.k_norm = nn.LayerNorm(hidden_size // num_heads, eps=NORM_EPS)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.proj_drop = nn.Dropout(dropout)

    def split_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, t, D) -> queries, keys, values, each (B, H, t, d)."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, t, 3, H, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v  # under autocast a norm returns float32

    def causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout = self.attn_drop if self.training else 0.0
        on_cpu = q.device.type == "cpu" and q.dtype == torch.float32
        if on_cpu and dropout > 0 and not torch.compiler.is_compiling():
            return cast(Tensor, CausalAttentionOnCpu.apply(q, k, v, dropout))
        # is_causal instead of a mask keeps the flash kernel.
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)

    def merge_heads(self, attended: Tensor) -> Tensor:
        """(B, H, t, d) -> (B, t, D)"""
        return self.proj_drop(self.proj(attended.transpose(1, 2).flatten(2)))


def mlp(size: int, hidden_size: int, dropout: float) -> nn.Sequential:
    """timm's Mlp, with its state-dict keys; importing timm is slow."""
    layers = {
        "fc1": nn.Linear(size, hidden_size),
        "act": nn.GELU(),
        "drop1": nn.Dropout(dropout),
        "fc2": nn.Linear(hidden_size, size),
        "drop2": nn.Dropout(dropout),
    }
    return nn.Sequential(OrderedDict(layers))


class Block(nn.Module):
    """Pre-norm transformer block with adaLN-zero (DiT, https://arxiv.org/abs/2212.09748)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_size: int, dropout: float, attn_drop: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.attn = Attention(hidden_size, num_heads, dropout, attn_drop)
        self.norm2 = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.mlp = mlp(hidden_size, mlp_size, dropout)
        self.adaLN_modulation = adaln_linear(hidden_size, 6)

    def forward(self, x: Tensor, condition: Tensor, rows: Tensor | None) -> Tensor:
        """x (B, t, D), condition (U, t, D), rows (B,) -> (B, t, D)."""
        modulation = self.modulation(self.adaLN_modulation(condition))
        q, k, v = self.before_attention(x, modulation, rows)
        return self.after_attention(x, self.attn.causal(q, k, v), modulation, rows)

    def modulation(self, adaln: Tensor) -> BlockModulation:
        """Split the output (U, t, 6 D) of `adaLN_modulation`."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = adaln.chunk(6, dim=-1)
        shift_attn, scale_attn = fold_norm(self.norm1, shift_attn, scale_attn)
        shift_mlp, scale_mlp = fold_norm(self.norm2, shift_mlp, scale_mlp)
        return BlockModulation(shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp)

    def before_attention(
        self, x: Tensor, modulation: BlockModulation, rows: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, H, t, d)."""
        return self.attn.split_heads(modulate(x, modulation.shift_attn, modulation.scale_attn, rows))

    def after_attention(self, x: Tensor, attended: Tensor, modulation: BlockModulation, rows: Tensor | None) -> Tensor:
        """The block's output from its input x (B, t, D) and the attention's result (B, H, t, d)."""
        x = torch.addcmul(x, gather_rows(modulation.gate_attn, rows), self.attn.merge_heads(attended))
        hidden = self.mlp(modulate(x, modulation.shift_mlp, modulation.scale_mlp, rows))
        return torch.addcmul(x, gather_rows(modulation.gate_mlp, rows), hidden)


class FinalLayer(nn.Module):
    """The modulated norm before the head, without affine parameters. Its adaLN output is (scale, shift)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=NORM_EPS, elementwise_affine=False)
        self.adaLN_modulation = adaln_linear(hidden_size, 2)

    def forward(self, x: Tensor, condition: Tensor, rows: Tensor | None) -> Tensor:
        shift, scale = self.modulation(self.adaLN_modulation(condition))
        return modulate(x, shift, scale, rows)

    def modulation(self, adaln: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale, each (U, t, D), from the output (U, t, 2 D) of `adaLN_modulation`."""
        scale, shift = adaln.chunk(2, dim=-1)
        return fold_norm(self.norm_final, shift, scale)
