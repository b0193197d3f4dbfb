"""Sampling codes: power-cosine guidance, top-k and top-p, and the loop over the codes of a batch of images.

Legend: B images, N codes per image, S sequences (B; with guidance 2 B, the conditional ones first), D hidden size,
V codebook size.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from modeling.input_validation import (
    check_raster,
    checked_class_labels,
    checked_conditioning,
    checked_orders,
    checked_uniforms,
)
from modeling.orders import conditioning_first
from modeling.rear import ReAR
from modeling.sampling.cached_decoding import (
    BUCKET,
    MODULATED,
    DecodingState,
    compile_for_decoding,
    decode_one_token,
    on_gpu,
    prefill,
)
from modeling.sampling.step_graph import StepGraphs
from utils.config_checks import check_ranges
from utils.errors import NonFiniteError
from utils.schema import SAMPLING_NAMES, GeneratorConfig

# Of `model.generator`; guidance may change between batches.
CAPTURED_KEYS = [name for name in SAMPLING_NAMES if not name.startswith("guidance_")]
LOGITS_NOT_FINITE = "the generator's logits are not finite: its weights are damaged or do not belong to this config"


def guidance_schedule(guidance_scale: float, guidance_scale_pow: float, steps: int) -> list[float]:
    """Power-cosine guidance: 1 + (g - 1) * (1 - cos(pi * (k / N) ** pow)) / 2 for step k = 0 .. N - 1.

    Source: MDTv2 (https://arxiv.org/abs/2303.14389), used by RAR and reAR.
    """
    ramp = [(1 - math.cos(math.pi * (k / steps) ** guidance_scale_pow)) / 2 for k in range(steps)]
    return [1 + (guidance_scale - 1) * r for r in ramp]


def guide(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance on two equally shaped tensors of logits, or of inputs of the linear head."""
    return uncond + scale * (cond - uncond)


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set logits (B, V) outside the `top_k` largest (0: off) or outside the nucleus `top_p` (1: off) to -inf."""
    if 0 < top_k < logits.shape[-1]:
        smallest_kept = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        outside = probabilities.cumsum(dim=-1) - probabilities >= top_p  # total probability of the higher-ranked codes
        logits = logits.masked_fill(outside.scatter(1, order, outside), -math.inf)
    return logits


def sample_codes(logits: Tensor, uniforms: Tensor) -> Tensor:
    """One code per row by the inverse of the cumulative distribution.

    Args:
        logits: (B, V) float32.
        uniforms: (B,) in [0, 1).

    Returns:
        (B,) int64; V, out of range, where logits are NaN or infinite: all comparisons with NaN fail, so that
        the search ends behind the last code.
    """
    # float64, so that uniform * total < total holds after rounding: the found code exists and has probability > 0.
    cumulative = logits.softmax(dim=-1).double().cumsum(dim=-1)  # (B, V)
    return torch.searchsorted(cumulative, uniforms.double()[:, None] * cumulative[:, -1:], right=True)[:, 0]


def sample_next_codes(hidden: Tensor, state: DecodingState, scales: Tensor, config: GeneratorConfig) -> None:
    """Sample from the head's input (S, D) into `state.codes`, except conditioning codes; advance `state.position`.

    Guidance is applied to the head's input instead of the logits. Both are linear, so the result is the same, and the
    head runs on B rows instead of 2 B.

    Args:
        scales: (N,) guidance of each code.
        config: temperature, top-k and top-p.
    """
    k = state.position - 1  # (1,) index of the code to sample
    if state.guided:
        cond, uncond = hidden.chunk(2)
        hidden = guide(cond, uncond, scales.index_select(0, k))  # (B, D)
    logits = state.model.lm_head(hidden) / config.randomize_temperature  # (B, V)
    logits = filter_logits(logits, config.top_k, config.top_p)
    codes = sample_codes(logits, state.uniforms.index_select(1, k)[:, 0])  # (B,)
    conditioning = state.conditioning.index_select(1, k)[:, 0]
    codes = torch.where(conditioning < 0, codes, conditioning)
    state.codes.index_copy_(1, k, codes[:, None])
    state.position.add_(1)


def next_codes(
    state: DecodingState,
    scales: Tensor,
    config: GeneratorConfig,
    end: int,
    masked: bool = False,
    sample: Callable[[Tensor, DecodingState, Tensor, GeneratorConfig], None] = sample_next_codes,
) -> None:
    """Decode and sample one code of each image; arguments as of `decode_one_token` and `sample_next_codes`.

    Args:
        sample: `sample_next_codes`, compiled or not.
    """
    sample(decode_one_token(state, end, masked), state, scales, config)


class CodeSampler:
    """Samples the codes of batches of images; buffers and CUDA graphs are kept for the next batch of the same size.

    Args:
        model: in float32; its weights must not change while this object is used.
        config: guidance, temperature, top-k and top-p.
        dtype: type of the blocks' matrix products and of the cache; everything else is float32.
        compile_mode: `sampling.compile`. off: operations are launched one by one; on: the step is compiled and, on
            CUDA, runs as a graph; auto: on on CUDA, off on a CPU, and off with a notice where that fails.
        notice: receives the notice, one line.

    Raises:
        ValueError: a model in a different precision, or a value of the config outside its range.
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
        self.model = model
        self.dtype = dtype
        self.compile_mode = compile_mode
        self.notice = notice
        self.steps = model.image_seq_len
        self.device = model.cls_token.device
        self.scales = torch.empty(self.steps, device=self.device)  # (N,)
        self.graphs: StepGraphs | None = None
        self.state: DecodingState | None = None
        self._captured: tuple[object, ...] | None = None  # settings that are constants in the captured graphs
        self.configure(config)

    @torch.inference_mode()
    def configure(self, config: GeneratorConfig) -> None:
        """Use this guidance, temperature, top-k and top-p from now on. If only the strength of the guidance changes,
        buffers and graphs are kept.

        Raises:
            ValueError: a value outside its range.
        """
        check_ranges(config, "model.generator.")
        guidance_scale = config.guidance_scale or 1.0  # 0 is 1 in the published code
        self.scales.copy_(torch.tensor(guidance_schedule(guidance_scale, config.guidance_scale_pow, self.steps)))
        self.guided = guidance_scale != 1
        captured = self.guided, *(getattr(config, key) for key in CAPTURED_KEYS)
        if captured != self._captured:
            self._free()
        self.config = config
        self._captured = captured

    @torch.inference_mode()
    def __call__(
        self,
        class_labels: Tensor,
        uniforms: Tensor,
        on_step: Callable[[], object] = lambda: None,
        orders: Tensor | None = None,
        conditioning_codes: Tensor | None = None,
        conditioning_mask: Tensor | None = None,
    ) -> Tensor:
        """Sample in raster order or in `orders`.

        Args:
            class_labels: (B,) integers from 0 to C - 1, or `model.null_class`; best on the CPU, as the uniforms: their
                values are checked first.
            uniforms: (B, N) random numbers in [0, 1), one row per image (`utils.randomness.image_uniforms`): an image
                depends on its own row only, not on the batch it is in.
            on_step: called after each position, for a progress bar.
            orders: (B, N) as in `ReAR.forward`; needs a model trained with a `config.order` other than raster.
            conditioning_codes: (B, N) in raster order, read where `conditioning_mask` is true.
            conditioning_mask: (B, N) bool, true where a code is given. Given codes come first in the order of their
                image and are kept, the others are sampled conditioned on them (inpainting). A model in raster order
                needs them to be the first codes of the image.

        Returns:
            (B, N) int64 codes in raster order, computed asynchronously on a GPU. V where logits were not finite:
            `ImageDecoder`, `PassThroughDecoder` and `generate` raise then.

        Raises:
            ValueError: an argument of the wrong shape, type or range, or an order that the model was not trained for.
        """
        class_labels = checked_class_labels(class_labels, self.model.num_classes)
        shape = (len(class_labels), self.steps)
        uniforms = checked_uniforms(uniforms, shape)
        conditioning = None
        if orders is not None:
            orders = checked_orders(orders, shape)
        if conditioning_codes is not None or conditioning_mask is not None:
            conditioning = checked_conditioning(conditioning_codes, conditioning_mask, shape, self.model.codebook_size)
            orders = conditioning_first(conditioning >= 0, orders)
        if orders is not None and self.config.order == "raster":
            check_raster(orders)
        # The precision is `dtype` under any autocast, and streams and graphs are those of the model's GPU.
        with torch.autocast(self.device.type, enabled=False), torch.cuda.device_of(self.scales):
            return self._sample(class_labels, uniforms, on_step, orders, conditioning)

    def _sample(
        self,
        class_labels: Tensor,
        uniforms: Tensor,
        on_step: Callable[[], object],
        orders: Tensor | None,
        conditioning: Tensor | None,
    ) -> Tensor:
        if self.state is None or len(self.state.codes) != len(class_labels):
            self.state = self._prepare(len(class_labels))
        state = self.state
        state.start(class_labels, uniforms, orders, conditioning)
        state.fill_modulations(0)
        sample_next_codes(prefill(state), state, self.scales, self.config)
        on_step()
        for position in range(2, self.steps + 1):
            if position % MODULATED == 0:
                state.fill_modulations(position)
            if self.graphs is not None:
                self.graphs.replay(bucket_end(position))
            else:
                next_codes(state, self.scales, self.config, end=position + 1)
            on_step()
        return state.codes_in_raster_order()

    def _prepare(self, images: int) -> DecodingState:
        """Allocate for batches of this size; compile and capture if asked for."""
        self._free()  # before the next state is allocated
        state = DecodingState(self.model, images, self.guided, self.dtype)
        if compiles(self.compile_mode, self.device):
            try:
                self.graphs = self._compile(state)
            except Exception as error:  # compilers, kernels and captures raise errors of many kinds
                if self.compile_mode == "on":
                    raise
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                self.notice(f"sampling.compile=auto: runs without a graph, since compiling the step failed: {reason}")
                self.compile_mode = "off"
                state.set_compiled(False)
        return state

    def _compile(self, state: DecodingState) -> StepGraphs | None:
        """Compile the step of a state by running it, and on a GPU capture it."""
        state.set_compiled(True)
        state.fill_modulations(0)
        state.position.fill_(2)
        ends = sorted({bucket_end(position) for position in range(2, self.steps + 1)})
        if on_gpu(self.device):
            sample = compile_for_decoding(sample_next_codes, self.device)
            return StepGraphs(partial(next_codes, state, self.scales, self.config, masked=True, sample=sample), ends)
        if ends:
            next_codes(state, self.scales, self.config, end=3)
        return None

    def _free(self) -> None:
        self.graphs = None  # first: it waits for replays, which use the state
        self.state = None


def compiles(compile_mode: str, device: torch.device) -> bool:
    return compile_mode == "on" or (compile_mode == "auto" and on_gpu(device))


def bucket_end(position: int) -> int:
    """Length of the attention of a CUDA graph's step: to the end of the bucket that holds `position`."""
    return (position // BUCKET + 1) * BUCKET


def codes_in_range(codes: Tensor, codebook_size: int) -> Tensor:
    """() bool on the codes' device: all are from 0 to V - 1."""
    return ((codes >= 0) & (codes < codebook_size)).all()


def generate(
    model: ReAR,
    class_labels: Tensor,
    uniforms: Tensor,
    config: GeneratorConfig,
    orders: Tensor | None = None,
    conditioning_codes: Tensor | None = None,
    conditioning_mask: Tensor | None = None,
) -> Tensor:
    """Codes (B, N) of one batch in float32, not compiled; arguments and ValueErrors as in `CodeSampler`.

    Raises:
        NonFiniteError: logits that are not finite.
    """
    codes = CodeSampler(model, config)(
        class_labels,
        uniforms,
        orders=orders,
        conditioning_codes=conditioning_codes,
        conditioning_mask=conditioning_mask,
    )
    if not codes_in_range(codes, model.codebook_size):
        raise NonFiniteError(LOGITS_NOT_FINITE)
    return codes
