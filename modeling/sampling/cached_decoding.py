"""One step of decoding with a KV cache: feed the codes at one position, get what predicts the next ones.

It is `ReAR.forward` for a single position, written with few operations on plain tensors: at one position, launching
kernels takes longer than what they compute. A step reads and writes buffers that keep their addresses, so that it can
be captured as a CUDA graph. The residual stream, norms and logits are float32; matrix products and cache have the dtype
of `DecoderWeights`.

With guidance each image is two sequences of the batch: one with its class label, one with the null class.

Legend: B images, N codes per image, S sequences (B; with guidance 2 B, the conditional ones first), D hidden size,
H heads, d = D / H, L cache length, M width of the MLP, V codebook size, U distinct class labels at most (the null class
is one), K = BUCKET positions.

    position       0     1      2    ...   N
    input          cls   class  x1   ...   xN-1          (the last code is never fed back)
    predicts             x1     x2   ...   xN

Where images have orders of their own, x1 .. xN stand in these (`modeling/rear.py`), and so do all codes here. Orders
are data: one step, and one graph, serves them all.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.blocks import Block
from modeling.rear import ReAR

# Consecutive positions that are prepared together: their adaLN modulations are computed at once, and one CUDA graph
# serves them all, with attention over the positions up to the bucket's end and a mask for those not yet decoded.
BUCKET = 32
NORM_EPS = 1e-6


class LayerWeights(NamedTuple):
    """What a step reads of one block; the norms' affine parameters are part of the modulations."""

    qkv_weight: Tensor  # (3 D, D)
    qkv_bias: Tensor
    qk_norm_weight: Tensor  # (2, 1, d) float32; the query's part holds the attention's 1 / sqrt(d)
    qk_norm_bias: Tensor
    proj_weight: Tensor  # (D, D)
    proj_bias: Tensor
    fc1_weight: Tensor  # (M, D)
    fc1_bias: Tensor
    fc2_weight: Tensor  # (D, M)
    fc2_bias: Tensor


class LayerBuffers(NamedTuple):
    """What steps keep of one block: its KV cache, and its adaLN modulations for the positions of the current bucket."""

    keys: Tensor  # (S, H, L, d)
    values: Tensor  # (S, H, L, d)
    attention: Tensor  # (K U, 3, D) float32: shift, 1 + scale, gate; row (position mod K) * U + class
    mlp: Tensor  # (K U, 3, D)


class Places(NamedTuple):
    """What a step reads of images with orders of their own or with known codes."""

    rows: Tensor  # (B, T) int64, by position: its row of the tables, 0, 1 and those of the codes in their order
    known_codes: Tensor  # (B, N) int64, in the order of the image; -1: to be sampled


class DecoderWeights:
    """A model's weights for decoding: matrices of the blocks in `dtype`, all else float32.

    Tensors that have their dtype already are shared with the model, so that nothing is copied at float32.
    """

    def __init__(self, model: ReAR, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self.blocks = cast(list[Block], list(model.blocks))
        self.num_heads = self.blocks[0].attn.num_heads
        self.layers = [self._layer(block) for block in self.blocks]
        self.adaln = [(linear.weight.to(dtype), linear.bias.to(dtype)) for linear in self._adaln_linears()]
        self.positions = model.position_table()[0]  # (T, D)

    def _layer(self, block: Block) -> LayerWeights:
        attention, mlp = block.attn, block.mlp
        linears = cast(list[torch.nn.Linear], [attention.qkv, attention.proj, mlp.fc1, mlp.fc2])
        (qkv, qkv_bias), *others = ((linear.weight.to(self.dtype), linear.bias.to(self.dtype)) for linear in linears)
        scale = (attention.qkv.in_features // self.num_heads) ** -0.5
        norm_weight = torch.stack([attention.q_norm.weight * scale, attention.k_norm.weight])[:, None]
        norm_bias = torch.stack([attention.q_norm.bias * scale, attention.k_norm.bias])[:, None]
        return LayerWeights(qkv, qkv_bias, norm_weight, norm_bias, *(tensor for pair in others for tensor in pair))

    def _adaln_linears(self) -> list[torch.nn.Linear]:
        modulations = [block.adaLN_modulation for block in self.blocks] + [
            self.model.adaln_before_head.adaLN_modulation
        ]
        return [cast(torch.nn.Linear, modulation[1]) for modulation in modulations]


def on_gpu(device: torch.device) -> bool:
    """Whether steps are those of a GPU: attention by SDPA, in whole buckets where they are captured."""
    return device.type != "cpu"


class DecodingState:
    """All that steps read and write, allocated once; `begin` fills it for a batch of images.

    Args:
        images: B of every batch.
        guided: with an unconditional sequence for each image.
        with_places: images have orders of their own, or known codes; else all are sampled in raster order.
    """

    def __init__(self, weights: DecoderWeights, images: int, guided: bool, with_places: bool = False) -> None:
        model, (hidden_size, device) = weights.model, (weights.positions.shape[1], weights.positions.device)
        self.weights, self.guided = weights, guided
        sequences, steps = 2 * images if guided else images, model.image_seq_len
        length = math.ceil((steps + 1) / BUCKET) * BUCKET
        self.max_classes = min(images + guided, model.num_classes + 1)  # U
        cache = (sequences, weights.num_heads, length, hidden_size // weights.num_heads)
        table = (BUCKET * self.max_classes, 3, hidden_size)

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            # Not torch.empty: later positions have weight 0 in the attention, but 0 * NaN would still be NaN.
            return torch.zeros(shape, dtype=dtype, device=device)

        def keys() -> Tensor:  # on a CPU they lie transposed, as the product of `attend` reads them
            if on_gpu(device):
                return zeros(*cache, dtype=weights.dtype)
            return zeros(*cache[:2], cache[3], cache[2], dtype=weights.dtype).mT

        self.layers = [
            LayerBuffers(keys(), zeros(*cache, dtype=weights.dtype), zeros(*table), zeros(*table))
            for _ in weights.layers
        ]
        self.head = zeros(table[0], 2, hidden_size)  # (K U, 2, D): 1 + scale, shift
        self.class_rows = zeros(sequences, dtype=torch.int64)
        self.sequence_labels = zeros(sequences, dtype=torch.int64)
        self.distinct_labels = zeros(0, dtype=torch.int64)
        self.uniforms = zeros(images, steps)
        self.codes = zeros(images, steps, dtype=torch.int64)
        self.places: Places | None = None
        if with_places:
            rows = torch.arange(steps + 2, device=device).repeat(images, 1)
            self.places = Places(rows, torch.full_like(self.codes, -1))
        self.position = zeros(1, dtype=torch.int64)  # of the newest input
        self.all_positions = torch.arange(length, device=device)

    def begin(
        self, class_labels: Tensor, uniforms: Tensor, orders: Tensor | None = None, known_codes: Tensor | None = None
    ) -> None:
        """Take the class labels (B,) and uniforms (B, N) of the next batch. Waits for the GPU, in `unique`.

        Args:
            orders: (B, N), if there are `places`.
            known_codes: (B, N) in raster order, -1 where there is none; None: none is known.
        """
        labels = class_labels
        if self.guided:
            labels = torch.cat([labels, torch.full_like(labels, self.weights.model.null_class)])  # (S,)
        distinct, rows = labels.unique(return_inverse=True)
        self.distinct_labels = distinct.to(self.position.device)
        self.sequence_labels.copy_(labels)
        self.class_rows.copy_(rows)
        self.uniforms.copy_(uniforms)
        if self.places is not None and orders is not None:
            self.places.rows[:, 2:].copy_(orders + 2)
            known = torch.full_like(orders, -1) if known_codes is None else known_codes.gather(1, orders)
            self.places.known_codes.copy_(known)
        self.position.zero_()

    def codes_in_raster_order(self) -> Tensor:
        """(B, N), a copy."""
        if self.places is None:
            return self.codes.clone()
        return torch.empty_like(self.codes).scatter_(1, self.places.rows[:, 2:] - 2, self.codes)

    def fill_modulations(self, first: int) -> None:
        """Compute the modulations of the bucket that starts at position `first`, once per distinct class."""
        model = self.weights.model
        last, classes = min(first + BUCKET, model.image_seq_len + 1), len(self.distinct_labels)
        embedded = model.embeddings(model.codebook_size + 1 + self.distinct_labels)  # (U, D)
        condition = F.silu(embedded + model.timesteps_embeddings[0, first:last, None])  # (K, U, D)
        condition = condition.to(self.weights.dtype)

        def rows(table: Tensor) -> Tensor:
            return table.unflatten(0, (BUCKET, self.max_classes))[: last - first, :classes]  # (K, U, 3, D)

        for block, layer, adaln in zip(self.weights.blocks, self.layers, self.weights.adaln[:-1], strict=True):
            modulation = F.linear(condition, *adaln).float().unflatten(-1, (2, 3, -1))  # (K, U, 2, 3, D)
            for table, norm, (shift, scale, gate) in (
                (layer.attention, block.norm1, modulation[..., 0, :, :].unbind(-2)),
                (layer.mlp, block.norm2, modulation[..., 1, :, :].unbind(-2)),
            ):  # (normed * w + b) * (1 + scale) + shift
                scale = 1 + scale
                rows(table).copy_(torch.stack([shift + norm.bias * scale, norm.weight * scale, gate], dim=-2))
        scale, shift = F.linear(condition, *self.weights.adaln[-1]).float().chunk(2, dim=-1)
        rows(self.head).copy_(torch.stack([1 + scale, shift], dim=-2))


def before_attention(
    x: Tensor, rows: Tensor, weights: LayerWeights, buffers: LayerBuffers
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values, each (S, H, 1, d), and the gate (S, D) of x (S, D)."""
    heads, size = buffers.values.shape[1], buffers.values.shape[3]
    shift, scale, gate = buffers.attention.index_select(0, rows).unbind(1)
    x = torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=NORM_EPS), scale)  # (S, D)
    qkv = F.linear(x.to(weights.qkv_weight.dtype), weights.qkv_weight, weights.qkv_bias)
    qkv = qkv.view(-1, 3, heads, size)  # (S, 3, H, d)
    qk = F.layer_norm(qkv.float(), (size,), eps=NORM_EPS)[:, :2]  # v's part is dropped; without it there is a copy
    qk = torch.addcmul(weights.qk_norm_bias, qk, weights.qk_norm_weight).to(qkv.dtype)
    return qk[:, 0, :, None], qk[:, 1, :, None], qkv[:, 2, :, None], gate


def after_attention(
    x: Tensor, attended: Tensor, gate: Tensor, rows: Tensor, weights: LayerWeights, buffers: LayerBuffers
) -> Tensor:
    """The block's output (S, D) from its input x and the attention's result (S, H, 1, d)."""
    x = torch.addcmul(x, gate, F.linear(attended.flatten(1), weights.proj_weight, weights.proj_bias).float())
    shift, scale, gate = buffers.mlp.index_select(0, rows).unbind(1)
    hidden = torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=NORM_EPS), scale).to(weights.fc1_weight.dtype)
    hidden = F.gelu(F.linear(hidden, weights.fc1_weight, weights.fc1_bias))  # (S, M)
    return torch.addcmul(x, gate, F.linear(hidden, weights.fc2_weight, weights.fc2_bias).float())


class StepFunctions(NamedTuple):
    """A block's step before and after the attention, plain or compiled."""

    before_attention: Callable[..., tuple[Tensor, ...]] = before_attention
    after_attention: Callable[..., Tensor] = after_attention


def compiled_functions() -> StepFunctions:
    """Each is compiled once and serves all layers and lengths of attention: its arguments have one shape."""
    return StepFunctions(torch.compile(before_attention), torch.compile(after_attention))


def prefill(state: DecodingState, functions: StepFunctions) -> Tensor:
    """Feed cls and class and return the head's input (S, D) for the first code."""
    prefix = state.weights.model.embed_prefix(state.sequence_labels)  # (S, 2, D)
    x_cls, x_class = prefix.transpose(0, 1).contiguous()  # strides as in later steps, so that nothing is compiled anew
    forward_position(state, x_cls + state.weights.positions[0], 1, False, functions)
    state.position.add_(1)
    by_image = x_class.unflatten(0, (-1, len(state.codes)))  # (1 or 2, B, D)
    return forward_position(state, (by_image + position_embeddings(state)).flatten(0, 1), 2, False, functions)


def position_embeddings(state: DecodingState) -> Tensor:
    """Of the input at `state.position` and of what it predicts, added: (1, D), or (B, D) where there are `places`."""
    if state.places is None:
        return state.weights.positions.index_select(0, state.position)
    own, predicted = (state.places.rows.index_select(1, state.position + i)[:, 0] for i in (0, 1))  # both (B,)
    model = state.weights.model
    return model.pos_embed[0].index_select(0, own) + model.target_aware_pos_embed[0].index_select(0, predicted)


def decode_one_token(state: DecodingState, end: int, masked: bool, functions: StepFunctions) -> Tensor:
    """Feed the newest codes, which stand at `state.position`, and return the head's input (S, D) for the next ones.

    Args:
        end: length of the attention, at least position + 1.
        masked: mask the positions after the current one; not needed where `end` is position + 1.
    """
    codes = state.codes.index_select(1, state.position - 2)[:, 0]  # (B,)
    x = state.weights.model.embeddings(codes) + position_embeddings(state)  # (B, D)
    return forward_position(state, torch.cat([x, x]) if state.guided else x, end, masked, functions)


def forward_position(state: DecodingState, x: Tensor, end: int, masked: bool, functions: StepFunctions) -> Tensor:
    """The head's input (S, D) of input x (S, D) at `state.position`, attending to the first `end` positions."""
    position = state.position
    rows = state.class_rows + position % BUCKET * state.max_classes  # (S,)
    mask = None
    if masked:  # (1, 1, 1, end)
        mask = torch.zeros(1, 1, 1, end, dtype=state.weights.dtype, device=x.device)
        mask = mask.masked_fill(state.all_positions[:end] > position, -math.inf)
    for weights, buffers in zip(state.weights.layers, state.layers, strict=True):
        q, k, v, gate = functions.before_attention(x, rows, weights, buffers)
        buffers.keys.index_copy_(2, position, k)  # outside the compiled functions, which might copy the cache
        buffers.values.index_copy_(2, position, v)
        attended = attend(q, buffers.keys[:, :, :end], buffers.values[:, :, :end], mask)
        x = functions.after_attention(x, attended, gate, rows, weights, buffers)
    scale, shift = state.head.index_select(0, rows).unbind(1)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=NORM_EPS), scale)


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention (S, H, 1, d) of scaled queries (S, H, 1, d) to keys and values (S, H, t, d)."""
    if on_gpu(q.device):
        return F.scaled_dot_product_attention(q, keys, values, mask, scale=1.0)
    # For a single query, two products take 3/4 of the time of SDPA's CPU kernel.
    scores = torch.bmm(q.flatten(0, 1), keys.flatten(0, 1).mT)  # (S H, 1, t)
    scores = scores if mask is None else scores + mask[0]
    probabilities = scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype)
    return torch.bmm(probabilities, values.flatten(0, 1)).view_as(q)
