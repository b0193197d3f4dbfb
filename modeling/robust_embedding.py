"""reAR's regularization, for any autoregressive transformer over the codes of an image tokenizer.

This file needs only torch: copy it into your code base. This project trains with the same functions.

    robust = RobustEmbedding(codebook, hidden_size=768)  # the tokenizer's (V, Z); its parameters go into the optimizer
    robust.attach(model, encode="blocks.0", decode="blocks.15", prefix=1)
    ...
    perturbed, mask = robust.perturb(codes, progress=step / num_steps)
    logits = model(perturbed)
    loss = cross_entropy(logits, codes) + robust.loss(codes, mask)

Source: the paper, section 3 (https://arxiv.org/abs/2510.04450); projectors and mask rule are the released code's.

Legend: B images, N codes x1 .. xN per image, P positions before x1 (a class, a prompt), D hidden size, V codebook size,
Z width of a codebook vector.

    position         0 ..   P - 1    P     ...    P + N - 2    P + N - 1
    input            prefix          x1    ...    xN-1         xN (not with `last_code=False`)
    decode, logits          x1       x2    ...    xN           -
    encode                           x1    ...    xN-1         xN

Both terms are taps: a projector maps a hidden state to the target vector of each code. `Tap` states where a tap reads
and how its term counts. With other target vectors, it computes other alignment losses, such as REPA's.

Random numbers are passed in as uniforms in [0, 1), so that a result depends on its arguments only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ANNEAL_END = 0.75  # share of the training steps after which the context is clean

# (codes (B, N), uniforms (B, 2 N + 1), max_ratio, V) -> (perturbed codes (B, N), mask (B, N) bool of replaced codes)
Perturbation = Callable[[Tensor, Tensor, float, int], tuple[Tensor, Tensor]]


def num_perturbation_uniforms(image_seq_len: int) -> int:
    """Uniforms of each image: one for its perturbation ratio, N that choose codes, N for their replacements."""
    return 2 * image_seq_len + 1


def perturbation_mask(uniforms: Tensor, max_ratio: float) -> Tensor:
    """Mask (B, N) of the codes to replace. An image draws its perturbation ratio from U(0, max_ratio), and each of its
    codes is replaced with that probability.

    Args:
        uniforms: (B, 2 N + 1); the first is for the ratio, the next N choose codes.
    """
    image_seq_len = uniforms.shape[1] // 2
    ratio, choice = uniforms[:, :1], uniforms[:, 1 : 1 + image_seq_len]
    return choice < ratio * max_ratio


def switch_codes(codes: Tensor, uniforms: Tensor, max_ratio: float, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Replace chosen codes by random ones of the whole codebook, so that a code may be replaced by itself."""
    mask = perturbation_mask(uniforms, max_ratio)
    replacement = (uniforms[:, 1 + codes.shape[1] :] * codebook_size).to(codes.dtype)
    return torch.where(mask, replacement, codes), mask


def mask_codes(codes: Tensor, uniforms: Tensor, max_ratio: float, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Replace chosen codes by the mask token, which follows the codebook (`codebook_size`)."""
    mask = perturbation_mask(uniforms, max_ratio)
    return torch.where(mask, codebook_size, codes), mask


def anneal(step: float, start: float, end: float) -> float:
    """1 until `start`, then linear to 0 at `end`. With 0 and 3/4 of the steps: the paper's f(t) = max(0, 1 - 4t/3)."""
    if step >= end:
        return 0.0
    if step <= start:
        return 1.0
    return (end - step) / (end - start)


def projector(hidden_size: int, projection_dim: int, z_dim: int) -> nn.Sequential:
    """Training-only MLP from hidden states to codebook vectors: three layers, as in the released weights."""
    return nn.Sequential(
        nn.Linear(hidden_size, projection_dim),
        nn.SiLU(),
        nn.Linear(projection_dim, projection_dim),
        nn.SiLU(),
        nn.Linear(projection_dim, z_dim),
    )


def cosine_to_targets(projection: Tensor, vectors: Tensor) -> Tensor:
    """(B, N) float32 cosines of projected hidden states (B, N, Z) and target vectors (B, N, Z) of the clean codes."""
    return F.cosine_similarity(projection.float(), vectors.float(), dim=-1)


def alignment_loss(cosine: Tensor, excluded: Tensor | None = None) -> Tensor:
    """Mean of -cos over all B * N positions.

    Args:
        cosine: (B, N).
        excluded: (B, N) bool; such positions add 0, and the divisor stays B * N, as in the released code.
    """
    if excluded is not None:
        cosine = cosine.masked_fill(excluded, 0.0)
    return -cosine.mean()


@dataclass(frozen=True)
class Tap:
    """Where a term reads the model, and how it counts in the loss.

    Attributes:
        name: name of the term.
        block: the block whose output is read: its index, or its name in `model.named_modules()`.
        positions: `own`: where a code is the input; `next`: where it is predicted, one position before.
        z_dim: Z, width of the target vectors and of the projection.
        weight: weight of the term among all taps.
        exclude_perturbed: positions of replaced codes add 0 to the term.
        end_step: step from which on the term is 0; None: never.
    """

    name: str
    block: int | str
    positions: Literal["own", "next"]
    z_dim: int
    weight: float = 1.0
    exclude_perturbed: bool = False
    end_step: int | None = None

    def read(self, hidden: Tensor, prefix: int, last_code: bool = True) -> Tensor:
        """Select the hidden states of x1 .. xN, (B, N, D), from hidden states (B, T, D).

        Args:
            prefix: P, positions before x1.
            last_code: whether T = P + N; else xN is no input, T = P + N - 1, and `own` reads x1 .. xN-1.
        """
        if self.positions == "own":
            return hidden[:, prefix:]
        return hidden[:, prefix - 1 : -1 if last_code else None]

    def term(self, projection: Tensor, vectors: Tensor, perturbed: Tensor | None) -> tuple[Tensor, Tensor]:
        """The alignment loss, a scalar before the weight, and the cosines (B, N) of a projection of `read`.

        Args:
            projection: (B, N, Z), or (B, N - 1, Z) without xN.
            vectors: (B, N, Z) targets of the clean codes.
            perturbed: (B, N) bool of replaced codes; None: none is excluded.
        """
        length = projection.shape[1]
        cosine = cosine_to_targets(projection, vectors[:, :length])
        excluded = perturbed[:, :length] if self.exclude_perturbed and perturbed is not None else None
        return alignment_loss(cosine, excluded), cosine


class RobustEmbedding(nn.Module):
    """Perturbation of the context, and two projectors that read hidden states of a model by hooks.

    The hooks do nothing while the model is in eval mode. They take part in the second pass of activation checkpointing,
    which must be torch's with `use_reentrant=False`. Call `attach` before the model is compiled. Under
    DistributedDataParallel or `fully_shard` make this a submodule of the model, so that its gradients are averaged too.

    Args:
        codebook: (V, Z) float, the tokenizer's embeddings of codes 0 .. V - 1. A copy is kept as a buffer, which is
            neither trained nor in the state dict.
        hidden_size: D of the model.
        projection_dim: hidden width of the projectors.
        weight: lambda, of the sum of encode and decode term.
        max_ratio: largest perturbation ratio at the start; it is annealed by f(t).
        perturbation: `switch_codes`, `mask_codes` (the model then needs an embedding for code V) or a similar function.
    """

    codebook: Tensor

    def __init__(
        self,
        codebook: Tensor,
        hidden_size: int,
        projection_dim: int = 2048,
        weight: float = 1.0,
        max_ratio: float = 1.0,
        perturbation: Perturbation = switch_codes,
    ) -> None:
        super().__init__()
        if codebook.ndim != 2 or not codebook.is_floating_point():
            raise ValueError(f"codebook: found {codebook.dtype} {tuple(codebook.shape)}, expected floats (V, Z)")
        self.hidden_size = hidden_size
        self.weight = weight
        self.max_ratio = max_ratio
        self.perturbation = perturbation
        self.register_buffer("codebook", codebook.detach().clone(), persistent=False)
        self.taps: tuple[Tap, ...] = ()  # set by `attach`
        self.encode_align_mlp = projector(hidden_size, projection_dim, codebook.shape[1])
        self.decode_align_mlp = projector(hidden_size, projection_dim, codebook.shape[1])
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self._hooks: list[Any] = []
        self._projected: dict[str, Tensor] = {}  # by term, of the last forward pass of the model
        self._in_forward = self._with_gradients = False

    @torch.no_grad()
    def perturb(self, codes: Tensor, progress: float, uniforms: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The perturbed context, the model's input; the targets stay the clean codes.

        Args:
            codes: (B, N) int, 0 to V - 1.
            progress: t, the share of the training steps that are done, 0 to 1.
            uniforms: (B, 2 N + 1) in [0, 1); None: drawn from torch's generator.

        Returns:
            perturbed codes (B, N), and the mask (B, N) bool of replaced codes.

        Raises:
            ValueError: wrong progress, shape or type.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress={progress}: expected 0 to 1, the share of the training steps that are done")
        if codes.ndim != 2 or codes.is_floating_point():
            raise ValueError(f"codes: found {codes.dtype} {tuple(codes.shape)}, expected integers (B, N)")
        shape = len(codes), num_perturbation_uniforms(codes.shape[1])
        if uniforms is None:
            uniforms = torch.rand(shape, device=codes.device)
        if uniforms.shape != shape:
            raise ValueError(f"uniforms: found {tuple(uniforms.shape)}, expected (B, 2 N + 1) = {shape}")
        max_ratio = self.max_ratio * anneal(progress, start=0.0, end=ANNEAL_END)
        return self.perturbation(codes, uniforms, max_ratio, len(self.codebook))

    def attach(self, model: nn.Module, encode: str, decode: str, prefix: int, last_code: bool = True) -> None:
        """Read the outputs of two blocks at each forward pass of `model` in training mode.

        Args:
            model: the module that is called in training, without a wrapper like DistributedDataParallel.
            encode, decode: names of blocks as in `model.named_modules()`; their output is (B, T, D), or a tuple that
                begins with it. The paper takes the first block and one at 3/4 of the depth.
            prefix: P, the positions before x1; at least 1, since the last of them predicts x1.
            last_code: whether xN is in the input, so that T = P + N; else T = P + N - 1, and the encode term is the
                mean over x1 .. xN-1.

        Raises:
            ValueError: no block of that name, or no prefix.
            RuntimeError: already attached.
        """
        if self._hooks:
            raise RuntimeError("already attached: call detach() first")
        if prefix < 1:
            raise ValueError(f"prefix={prefix}: expected at least 1, a position that predicts the first code")
        modules = dict(model.named_modules())
        for name in (encode, decode):
            if name not in modules:
                near = ", ".join(get_close_matches(name, modules, n=3, cutoff=0.0))
                raise ValueError(f"no module {name!r} in {type(model).__name__}; similar names: {near}")
        self.prefix = prefix
        self.last_code = last_code
        z_dim = self.codebook.shape[1]
        self.taps = (
            Tap("encode", encode, positions="own", z_dim=z_dim, exclude_perturbed=True),
            Tap("decode", decode, positions="next", z_dim=z_dim),
        )
        self._hooks = [
            model.register_forward_pre_hook(self._begin),
            *(modules[str(tap.block)].register_forward_hook(partial(self._project, tap)) for tap in self.taps),
            model.register_forward_hook(self._end),
        ]

    def detach(self) -> None:
        """Remove the hooks from the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._projected.clear()

    def loss(self, codes: Tensor, mask: Tensor | None = None) -> Tensor:
        """weight * (encode + decode), each the mean of -cos, of the last forward pass; call it once per pass.

        Args:
            codes: (B, N) the clean codes.
            mask: (B, N) bool of `perturb`; the encode term leaves these positions out, as the released code does. None:
                it includes them, as the paper does.

        Raises:
            RuntimeError: no forward pass to read.
            ValueError: shapes that differ from the forward pass.
        """
        if not self.taps or self._projected.keys() != {tap.name for tap in self.taps}:
            raise RuntimeError(
                "no projections: expected attach(), then a forward pass of the model in training mode since the last "
                "loss()"
            )
        projections, self._projected = self._projected, {}
        encoded = codes.shape[1] - (not self.last_code)
        found = len(projections["encode"]), self.prefix + projections["encode"].shape[1]
        expected = len(codes), self.prefix + encoded
        if found != expected:
            raise ValueError(
                f"the encode block saw (B, T) = {found}, expected {expected}: {self.prefix} of prefix + {encoded} codes"
            )
        if mask is not None and mask.shape != codes.shape:
            raise ValueError(f"mask: found {tuple(mask.shape)}, expected that of the codes, {tuple(codes.shape)}")
        vectors = F.embedding(codes, self.codebook)  # (B, N, Z)
        encode, decode = (tap.term(projections[tap.name], vectors, mask)[0] for tap in self.taps)
        return self.weight * (encode + decode)

    def _begin(self, model: nn.Module, inputs: Any) -> None:
        self._projected.clear()
        self._in_forward = True
        self._with_gradients = torch.is_grad_enabled()

    def _end(self, model: nn.Module, inputs: Any, output: Any) -> None:
        self._in_forward = False

    def _project(self, tap: Tap, block: nn.Module, inputs: Any, output: Any) -> None:
        """Runs the projector where the block runs: the second pass of checkpointing must repeat it."""
        if not block.training:
            return
        hidden = output[0] if isinstance(output, tuple) else output
        if not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.shape[2] != self.hidden_size:
            found = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise ValueError(f"{tap.block}: its output is {found}, expected (B, T, {self.hidden_size})")
        if self._in_forward and self._with_gradients and not torch.is_grad_enabled():
            raise RuntimeError(
                f"{tap.block} runs without gradients; use activation checkpointing with use_reentrant=False"
            )
        projector_of_tap = self.encode_align_mlp if tap.name == "encode" else self.decode_align_mlp
        projected = projector_of_tap(tap.read(hidden, self.prefix, self.last_code))
        if self._in_forward:  # and not in the second pass, during backward
            self._projected[tap.name] = projected
