"""Decoding with a KV cache: the blocks of `modeling/blocks.py`, one position at a time.

This is `ReAR.forward` for a single position. The cache keeps keys and values of earlier positions, and the adaLN
modulations of MODULATED positions are computed together, per distinct label. All buffers keep their addresses, so that
a step can be captured as a CUDA graph. Residual stream, norms and logits are float32; the matrix products of the blocks
and the cache have the dtype of the `DecodingState`.

With guidance each image is two sequences of the batch: one with its class label, one with the null class.

Legend: B images, N codes per image, S sequences (B; with guidance 2 B, the conditional ones first), D hidden size,
H heads, d = D / H, L cache length, U distinct class labels at most (the null class is one), K = MODULATED positions.

    position       0     1      2    ...   N
    input          cls   class  x1   ...   xN-1          (the last code is never an input)
    predicts             x1     x2   ...   xN

x1 .. xN are the codes in the order of their image (`modeling/orders.py`).
"""

import copy
import math
from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.blocks import NORM_EPS, Attention, Block, BlockModulation, FinalLayer, modulate
from modeling.rear import ReAR

MODULATED = 32  # positions whose modulations are computed together
# Positions that one CUDA graph serves: it attends to all positions up to the end of the bucket, with a mask for those
# not decoded yet. Half the bucket is read in vain on average, and each bucket is captured.
BUCKET = 16
# Inductor fuses more than by default, since a step consists of many small kernels: independent ones too, such as the
# norms of queries and keys and the write to the cache.
FUSION: dict[str, str | int | bool | Callable] = {"combo_kernels": True, "score_fusion_memory_threshold": 0}
LayerT = TypeVar("LayerT", bound=nn.Module)
FunctionT = TypeVar("FunctionT", bound=Callable)


def on_gpu(device: torch.device) -> bool:
    """Which kernels decoding uses: on a GPU SDPA, over whole buckets where a CUDA graph is captured."""
    return device.type != "cpu"


def compile_for_decoding(function: FunctionT, device: torch.device) -> FunctionT:
    return cast(FunctionT, torch.compile(function, options=FUSION if on_gpu(device) else None))


class CastingLinear(nn.Module):
    """A linear layer with weights in `dtype`, to which it casts its input."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
        self.bias = nn.Parameter(linear.bias.detach().to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class Float32Norm(nn.Module):
    """`scale * norm(x)` in float32."""

    def __init__(self, norm: nn.LayerNorm, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(norm.weight.detach() * scale, requires_grad=False)
        self.bias = nn.Parameter(norm.bias.detach() * scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, NORM_EPS)


def decoding_copy(layer: LayerT, dtype: torch.dtype) -> LayerT:
    """A block or final layer without dropout, with linears in `dtype` and the scale of the attention, 1 / sqrt(d), in
    `q_norm`. It shares all other weights."""
    copied = copy.deepcopy(layer, {id(parameter): parameter for parameter in layer.parameters()})
    for parent in [*copied.modules()]:
        for name, child in [*parent.named_children()]:
            if isinstance(child, nn.Dropout):
                setattr(parent, name, nn.Identity())
            elif isinstance(child, nn.Linear) and child.weight.dtype != dtype:
                setattr(parent, name, CastingLinear(child, dtype))
            elif isinstance(parent, Attention) and isinstance(child, nn.LayerNorm):
                scale = child.normalized_shape[0] ** -0.5 if name == "q_norm" else 1.0
                setattr(parent, name, Float32Norm(child, scale))
    return copied


class KVCache:
    """Keys and values (S, H, L, d) of one block."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        # Not torch.empty: later positions have weight 0 in the attention, but 0 * NaN would still be NaN.
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        if on_gpu(device):
            self.keys = torch.zeros_like(self.values)
        else:  # transposed in memory, as the product of `attend` reads them
            self.keys = torch.zeros_like(self.values.mT.contiguous()).mT

    def update(self, position: Tensor, k: Tensor, v: Tensor) -> None:
        """Write k and v (S, H, 1, d) at `position` (1,)."""
        self.keys.index_copy_(2, position, k)
        self.values.index_copy_(2, position, v)

    def attend(self, q: Tensor, end: int, mask: Tensor | None) -> Tensor:
        """Attention (S, H, 1, d) of scaled queries (S, H, 1, d) to the first `end` positions."""
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        if on_gpu(q.device):
            return F.scaled_dot_product_attention(q, keys, values, mask, scale=1.0)
        # For a single query, two products take 3/4 of the time of SDPA's CPU kernel.
        scores = torch.bmm(q.flatten(0, 1), keys.flatten(0, 1).mT)  # (S H, 1, end)
        scores = scores if mask is None else scores + mask[0]
        probabilities = scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype)
        return torch.bmm(probabilities, values.flatten(0, 1)).view_as(q)


class DecodingState:
    """Weights and buffers of decoding, allocated once; `start` fills the buffers for a batch of images.

    Args:
        images: B of every batch.
        guided: with an unconditional sequence for each image.
        dtype: type of the blocks' matrix products and of the cache.
    """

    @torch.no_grad()
    def __init__(self, model: ReAR, images: int, guided: bool, dtype: torch.dtype = torch.float32) -> None:
        self.model = model
        self.guided = guided
        self.dtype = dtype
        self.blocks = [decoding_copy(cast(Block, block), dtype) for block in model.blocks]
        self.final_layer = decoding_copy(model.adaln_before_head, dtype)
        self.set_compiled(False)

        device = model.cls_token.device
        steps = model.image_seq_len
        hidden_size = model.cls_token.shape[2]
        sequences = 2 * images if guided else images
        length = math.ceil((steps + 1) / BUCKET) * BUCKET
        heads = model.config.generator.num_attention_heads
        self.max_labels = min(images + guided, model.num_classes + 1)  # U
        # Row (position mod K) * U + label.
        table = torch.zeros(MODULATED * self.max_labels, 1, hidden_size, device=device)
        self.modulations = [BlockModulation(*(table.clone() for _ in BlockModulation._fields)) for _ in self.blocks]
        self.final_modulation = table.clone(), table.clone()  # shift, scale
        self.caches = [KVCache((sequences, heads, length, hidden_size // heads), dtype, device) for _ in self.blocks]
        self.all_positions = torch.arange(length, device=device)

        self.distinct_labels = torch.zeros(0, dtype=torch.int64, device=device)
        self.sequence_labels = torch.zeros(sequences, dtype=torch.int64, device=device)
        self.label_rows = torch.zeros(sequences, dtype=torch.int64, device=device)
        self.position_embeddings = torch.zeros(images, steps + 2, hidden_size, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # of the newest input
        self.uniforms = torch.zeros(images, steps, device=device)
        self.orders = torch.zeros(images, steps, dtype=torch.int64, device=device)
        self.codes = torch.zeros_like(self.orders)  # x1 .. xN
        self.conditioning = torch.zeros_like(self.orders)  # given codes, which are not sampled; -1: none

    def set_compiled(self, compiled: bool) -> None:
        """Each function is compiled once, for all blocks and positions: its arguments have the same shapes. Between
        them is the attention, whose length changes."""

        def prepare(function: FunctionT) -> FunctionT:
            return compile_for_decoding(function, self.model.cls_token.device) if compiled else function

        self.embed_newest = prepare(embed_newest)
        self.before_first_attention = prepare(before_first_attention)
        self.between_attentions = prepare(between_attentions)
        self.after_last_attention = prepare(after_last_attention)
        self.write_modulations = prepare(write_modulations)
        self.compiled = compiled

    def start(
        self, class_labels: Tensor, uniforms: Tensor, orders: Tensor | None = None, conditioning: Tensor | None = None
    ) -> None:
        """Begin a batch. Waits for the GPU, in `unique`.

        Args:
            class_labels: (B,).
            uniforms: (B, N), in the order of prediction.
            orders: (B, N); None: raster.
            conditioning: (B, N) given codes in raster order, -1 where a code must be sampled; None: sample all.
        """
        labels = class_labels
        if self.guided:
            labels = torch.cat([labels, torch.full_like(labels, self.model.null_class)])  # (S,)
        distinct, rows = labels.unique(return_inverse=True)
        self.distinct_labels = distinct.to(self.position.device)
        self.sequence_labels.copy_(labels)
        self.label_rows.copy_(rows)
        self.uniforms.copy_(uniforms)
        if orders is None:
            self.orders.copy_(torch.arange(self.model.image_seq_len, device=self.orders.device))
            self.position_embeddings.copy_(self.model.position_table())
        else:
            self.orders.copy_(orders)
            self.position_embeddings.copy_(self.model.position_table(self.orders))
        if conditioning is None:
            self.conditioning.fill_(-1)
        else:
            self.conditioning.copy_(conditioning.to(self.orders.device).gather(1, self.orders))
        self.position.zero_()

    def codes_in_raster_order(self) -> Tensor:
        """(B, N), a copy."""
        return torch.empty_like(self.codes).scatter_(1, self.orders, self.codes)

    def fill_modulations(self, first: int) -> None:
        """Compute the modulations of MODULATED positions from `first`, once per distinct label."""
        last = min(first + MODULATED, self.model.image_seq_len + 1)
        condition = self.model.condition(self.distinct_labels, slice(first, last))  # (U, K, D)
        condition = condition.transpose(0, 1).contiguous()  # (K, U, D)
        if self.compiled:  # of the full size each time, so that nothing is recompiled
            filled = torch.zeros(MODULATED, self.max_labels, condition.shape[2], device=condition.device)
            filled[: condition.shape[0], : condition.shape[1]] = condition
            condition = filled
        for block, tables in zip(self.blocks, self.modulations, strict=True):
            self.write_modulations(block, condition, tables)
        self.write_modulations(self.final_layer, condition, self.final_modulation)


def write_modulations(layer: Block | FinalLayer, condition: Tensor, tables: tuple[Tensor, ...]) -> None:
    """Modulations of a layer for a condition (K, U, D), of fewer positions or labels too, into tables (K U, 1, D)."""
    for table, value in zip(tables, layer.modulation(layer.adaLN_modulation(condition).float()), strict=True):
        table.view(MODULATED, len(table) // MODULATED, -1)[: value.shape[0], : value.shape[1]].copy_(value)


def prefill(state: DecodingState) -> Tensor:
    """Feed cls and class; the head's input (S, D) for x1."""
    position_embeddings = state.position_embeddings[:, :2].repeat(1 + state.guided, 1, 1)  # (S, 2, D)
    prefix = state.model.embed_prefix(state.sequence_labels) + position_embeddings
    cls, class_ = prefix.transpose(0, 1).contiguous()  # strides as in later steps, so that nothing is recompiled
    forward_position(state, cls[:, None], rows_of_modulations(state), end=1)
    state.position.add_(1)
    return forward_position(state, class_[:, None], rows_of_modulations(state), end=2)


def decode_one_token(state: DecodingState, end: int, masked: bool) -> Tensor:
    """Feed the newest codes, which are at `state.position`; the head's input (S, D) for the next ones.

    Args:
        end: length of the attention, at least position + 1.
        masked: mask the positions after the current one; needed where `end` is more than position + 1.
    """
    x, rows, mask = state.embed_newest(state, masked)
    return forward_position(state, x, rows, end, mask)


def embed_newest(state: DecodingState, masked: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input (S, 1, D) of the blocks, their `rows` (S,) of the modulations, and the mask (1, 1, 1, L) if wanted."""
    codes = state.codes.index_select(1, state.position - 2)[:, 0]  # (B,)
    x = state.model.embeddings(codes) + state.position_embeddings.index_select(1, state.position)[:, 0]  # (B, D)
    x = torch.cat([x, x]) if state.guided else x  # (S, D)
    mask = None
    if masked:
        mask = torch.zeros(1, 1, 1, len(state.all_positions), dtype=state.dtype, device=x.device)
        mask = mask.masked_fill(state.all_positions > state.position, -math.inf)
    return x[:, None], rows_of_modulations(state), mask


def rows_of_modulations(state: DecodingState) -> Tensor:
    """(S,), of the tables of `fill_modulations`."""
    return state.label_rows + state.position % MODULATED * state.max_labels


def forward_position(state: DecodingState, x: Tensor, rows: Tensor, end: int, mask: Tensor | None = None) -> Tensor:
    """The head's input (S, D) from the input x (S, 1, D) at `state.position`."""
    blocks, modulations, caches = state.blocks, state.modulations, state.caches
    mask = None if mask is None else mask[..., :end]
    q = state.before_first_attention(blocks[0], x, modulations[0], rows, caches[0], state.position)
    for i in range(1, len(blocks)):
        attended = caches[i - 1].attend(q, end, mask)
        x, q = state.between_attentions(
            previous=blocks[i - 1],
            block=blocks[i],
            x=x,
            attended=attended,
            previous_modulation=modulations[i - 1],
            modulation=modulations[i],
            rows=rows,
            cache=caches[i],
            position=state.position,
        )
    attended = caches[-1].attend(q, end, mask)
    return state.after_last_attention(blocks[-1], x, attended, modulations[-1], state.final_modulation, rows)


def before_first_attention(
    block: Block, x: Tensor, modulation: BlockModulation, rows: Tensor, cache: KVCache, position: Tensor
) -> Tensor:
    """Queries (S, H, 1, d) of a block; its keys and values go into the cache."""
    q, k, v = block.before_attention(x, modulation, rows)
    cache.update(position, k, v)
    return q


def between_attentions(
    previous: Block,
    block: Block,
    x: Tensor,
    attended: Tensor,
    previous_modulation: BlockModulation,
    modulation: BlockModulation,
    rows: Tensor,
    cache: KVCache,
    position: Tensor,
) -> tuple[Tensor, Tensor]:
    """Input x (S, 1, D) and queries (S, H, 1, d) of `block` from the previous block's input and attention.

    Compiled together, the end of a block and the beginning of the next take one kernel less than apart.
    """
    x = previous.after_attention(x, attended, previous_modulation, rows)
    return x, before_first_attention(block, x, modulation, rows, cache, position)


def after_last_attention(
    block: Block,
    x: Tensor,
    attended: Tensor,
    modulation: BlockModulation,
    final_modulation: tuple[Tensor, Tensor],
    rows: Tensor,
) -> Tensor:
    """The head's input (S, D)."""
    x = block.after_attention(x, attended, modulation, rows)
    shift, scale = final_modulation
    return modulate(x, shift, scale, rows)[:, 0]
