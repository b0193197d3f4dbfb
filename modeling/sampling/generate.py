"""Sampling codes: power-cosine guidance, top-k and top-p, and the loop over the codes of a batch of images, in raster
order or another one, all of them or those that are not known.

Legend: B images, N codes per image, S sequences (B; with guidance 2 B, the conditional ones first), D hidden size,
V codebook size, H x W pixels.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from modeling.input_validation import (
    check_raster,
    checked_class_labels,
    checked_known,
    checked_orders,
    checked_uniforms,
)
from modeling.orders import known_first
from modeling.rear import ReAR
from modeling.sampling.cached_decoding import (
    BUCKET,
    DecoderWeights,
    DecodingState,
    StepFunctions,
    compiled_functions,
    decode_one_token,
    on_gpu,
    prefill,
)
from modeling.sampling.image_decoder import LOGITS_NOT_FINITE, are_codes
from modeling.sampling.step_graph import StepGraphs
from utils.config_checks import check_ranges
from utils.errors import NonFiniteError
from utils.schema import GeneratorConfig


def guidance_schedule(guidance_scale: float, guidance_scale_pow: float, steps: int) -> list[float]:
    """Power-cosine guidance: 1 + (g - 1) * (1 - cos(pi * (k / N) ** pow)) / 2 for step k = 0 .. N - 1.

    Source: MDTv2 (https://arxiv.org/abs/2303.14389), used by RAR and reAR.
    """
    ramp = [(1 - math.cos(math.pi * (k / steps) ** guidance_scale_pow)) / 2 for k in range(steps)]
    return [1 + (guidance_scale - 1) * r for r in ramp]


def guide(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance on two equally shaped tensors of logits, or of what logits depend on linearly."""
    return uncond + scale * (cond - uncond)


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
        (B,) int64; V, which is no code, where the logits are no distribution (NaN, or infinite): all comparisons with
        NaN fail, and the search ends behind the last code.
    """
    # float64, so that uniform * total < total holds after rounding: the found code exists and has probability > 0.
    cumulative = logits.softmax(dim=-1).double().cumsum(dim=-1)  # (B, V)
    return torch.searchsorted(cumulative, uniforms.double()[:, None] * cumulative[:, -1:], right=True)[:, 0]


def choose_codes(hidden: Tensor, state: DecodingState, scales: Tensor, config: GeneratorConfig) -> None:
    """Sample the next codes from the head's input (S, D) into `state.codes` and advance `state.position` to them.

    Guidance is applied to the head's input instead of the logits. Both are linear, so the result is the same, and the
    head runs on B rows instead of 2 B.
    """
    k = state.position - 1  # (1,) which code
    if state.guided:
        cond, uncond = hidden.chunk(2)
        hidden = guide(cond, uncond, scales.index_select(0, k))  # (B, D)
    logits = state.weights.model.lm_head(hidden) / config.randomize_temperature  # (B, V)
    logits = filter_logits(logits, config.top_k, config.top_p)
    codes = sample_codes(logits, state.uniforms.index_select(1, k)[:, 0])  # (B,)
    if state.places is not None:
        known = state.places.known_codes.index_select(1, k)[:, 0]
        codes = torch.where(known < 0, codes, known)
    state.codes.index_copy_(1, k, codes[:, None])
    state.position.add_(1)


class CodeSampler:
    """Samples the codes of batches of images; buffers and CUDA graphs are kept for the next batch of the same size.

    Args:
        model: in float32 and eval mode; its weights must not change while this object is used.
        config: guidance, temperature, top-k and top-p.
        dtype: of the blocks' matrix products and of the cache; everything else is float32.
        compile_mode: `sampling.compile`. off: operations are launched one by one; on: the step is compiled and, on
            CUDA, runs as a graph; auto: on on CUDA, off on a CPU, and off with a notice where that fails.
        notice: receives the notice, one line.

    Raises:
        ValueError: a model in another precision, or a value of the config outside its range.
    """

    def __init__(
        self,
        model: ReAR,
        config: GeneratorConfig,
        dtype: torch.dtype = torch.float32,
        compile_mode: str = "off",
        notice: Callable[[str], object] = print,
    ) -> None:
        if other := {parameter.dtype for parameter in model.parameters()} - {torch.float32}:
            raise ValueError(f"model in {other.pop()}: expected torch.float32; sampling rounds it to its own `dtype`")
        self.compile_mode, self.notice = compile_mode, notice
        with torch.inference_mode():
            self.weights = DecoderWeights(model, dtype)
        self.steps, self.device = model.image_seq_len, model.cls_token.device
        self.scales = torch.empty(self.steps, device=self.device)  # (N,)
        self.graphs: StepGraphs | None = None  # goes before the state, whose buffers it uses
        self.state: DecodingState | None = None
        self.functions = StepFunctions()
        self.captured: tuple[bool, float, int, float] | None = None  # what graphs hold of the config
        self.configure(config)

    @torch.inference_mode()
    def configure(self, config: GeneratorConfig) -> None:
        """Sample with this guidance, temperature, top-k and top-p from now on. Where only the strength of the guidance
        changes, buffers and graphs stay.

        Raises:
            ValueError: a value outside its range.
        """
        check_ranges(config, "model.generator.")
        self.config = config
        self.guidance_scale = config.guidance_scale or 1.0  # 0 is 1 in the published code
        self.scales.copy_(torch.tensor(guidance_schedule(self.guidance_scale, config.guidance_scale_pow, self.steps)))
        captured = self.guidance_scale != 1, config.randomize_temperature, config.top_k, config.top_p
        if self.state is not None and captured != self.captured:
            self.graphs = None  # waits for replays, which use the state
            self.state = None
        self.captured = captured

    @torch.inference_mode()
    def __call__(
        self,
        class_labels: Tensor,
        uniforms: Tensor,
        on_step: Callable[[], object] = lambda: None,
        orders: Tensor | None = None,
        known_codes: Tensor | None = None,
        known_mask: Tensor | None = None,
    ) -> Tensor:
        """Sample in raster order or in `orders`, what is known first.

        Args:
            class_labels: (B,) integers from 0 to C - 1, or `model.null_class`; best on the CPU, as the uniforms: they
                are looked at before the first step.
            uniforms: (B, N) random numbers in [0, 1), one row per image (`utils.randomness.image_uniforms`): an image
                depends on its own row only, not on the batch it is in.
            on_step: called after each position, for a progress bar.
            orders: (B, N) as in `ReAR.forward`; for models that `config.order` says are trained so.
            known_codes: (B, N) in raster order, for `known_mask`; others are not looked at.
            known_mask: (B, N) bool; these codes stay and come first, the others are sampled given them. In raster order
                the known ones must be the first ones of their image.

        Returns:
            (B, N) int64 codes in raster order; a GPU may still be at work on them. V where logits were not finite:
            `ImageDecoder`, `KeptCodes` and `generate` refuse that.

        Raises:
            ValueError: an argument of another shape, type or range, or an order that the model was not trained for.
        """
        class_labels = checked_class_labels(class_labels, self.weights.model.num_classes)
        shape = (len(class_labels), self.steps)
        uniforms = checked_uniforms(uniforms, shape)
        if orders is not None:
            orders = checked_orders(orders, shape)
        if known_codes is not None or known_mask is not None:
            known_codes = checked_known(known_codes, known_mask, shape, self.weights.model.codebook_size)
            orders = known_first(known_codes >= 0, orders)
        if orders is not None and self.config.order == "raster":
            check_raster(orders)
        # The precision is `dtype`, wherever this is called, and streams and graphs are those of the model's GPU.
        with torch.autocast(self.device.type, enabled=False), torch.cuda.device_of(self.scales):
            return self._sample(class_labels, uniforms, on_step, orders, known_codes)

    def _sample(
        self,
        class_labels: Tensor,
        uniforms: Tensor,
        on_step: Callable[[], object],
        orders: Tensor | None,
        known_codes: Tensor | None,
    ) -> Tensor:
        kind = len(class_labels), orders is not None
        if self.state is None or (len(self.state.codes), self.state.places is not None) != kind:
            self.state = self._prepare(*kind)
        state = self.state
        state.begin(class_labels, uniforms, orders, known_codes)
        state.fill_modulations(0)
        choose_codes(prefill(state, self.functions), state, self.scales, self.config)
        on_step()
        for position in range(2, self.steps + 1):
            if position % BUCKET == 0:
                state.fill_modulations(position)
            if self.graphs is not None:
                self.graphs.replay(bucket_end(position))
            else:
                self._step(state, position + 1, masked=False)
            on_step()
        return state.codes_in_raster_order()

    def _step(self, state: DecodingState, end: int, masked: bool) -> None:
        hidden = decode_one_token(state, end, masked, self.functions)
        choose_codes(hidden, state, self.scales, self.config)

    def _prepare(self, images: int, with_places: bool) -> DecodingState:
        """Allocate for batches of this size; compile and capture where that is asked for."""
        self.graphs = None  # waits for replays, which use the state
        self.state = None  # freed before the next one is allocated
        state = DecodingState(self.weights, images, guided=self.guidance_scale != 1, with_places=with_places)
        if not compiles(self.compile_mode, self.device):
            return state
        try:
            self.functions = compiled_functions()
            self._warm_up(state)
        except Exception as error:  # compilers, kernels and captures raise errors of many kinds
            if self.compile_mode == "on":
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self.notice(f"sampling.compile=auto: the step runs without a graph, since compiling it failed: {reason}")
            self.compile_mode, self.functions, self.graphs = "off", StepFunctions(), None
        return state

    def _warm_up(self, state: DecodingState) -> None:
        def rewind() -> None:
            state.position.fill_(2)

        ends = sorted({bucket_end(position) for position in range(2, self.steps + 1)})
        if on_gpu(self.device):
            self.graphs = StepGraphs(lambda end: self._step(state, end, masked=True), rewind, ends)
        elif ends:
            rewind()
            self._step(state, 3, masked=False)


def compiles(compile_mode: str, device: torch.device) -> bool:
    return compile_mode == "on" or (compile_mode == "auto" and on_gpu(device))


def bucket_end(position: int) -> int:
    """Positions that a CUDA graph's step attends to: up to the end of the bucket that holds `position`."""
    return (position // BUCKET + 1) * BUCKET


def generate(
    model: ReAR,
    class_labels: Tensor,
    uniforms: Tensor,
    config: GeneratorConfig,
    orders: Tensor | None = None,
    known_codes: Tensor | None = None,
    known_mask: Tensor | None = None,
) -> Tensor:
    """Codes (B, N) of one batch in float32, not compiled; arguments and ValueErrors as in `CodeSampler`.

    Raises:
        NonFiniteError: logits that are not finite.
    """
    sampler = CodeSampler(model, config)
    codes = sampler(class_labels, uniforms, orders=orders, known_codes=known_codes, known_mask=known_mask)
    if not are_codes(codes, model.codebook_size):
        raise NonFiniteError(LOGITS_NOT_FINITE)
    return codes
