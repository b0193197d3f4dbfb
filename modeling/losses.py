"""The training objective as pure functions of tensors (paper, section 3: https://arxiv.org/abs/2510.04450).

Legend: B images, N codes per image, V codebook size, Z width of a codebook vector. Random numbers come in as
uniforms in [0, 1), so that a result depends on its arguments only.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.rear import ReAROutput
from utils.schema import GeneratorConfig


@dataclass
class LossTerms:
    """Scalars of a micro-batch; `loss` is what is minimized."""

    loss: Tensor
    ar_loss: Tensor  # cross-entropy, nats per code
    proj_loss: Tensor  # encode + decode alignment, before the weight; 0 without regularization
    correct_tokens: Tensor  # share of codes whose logit is the largest

    @property
    def metrics(self) -> dict[str, Tensor]:
        names = ("loss", "ar_loss", "proj_loss", "correct_tokens")
        return {f"train/{name}": getattr(self, name).detach() for name in names}


def perturb_codes(
    codes: Tensor, uniforms: Tensor, max_ratio: float, codebook_size: int, mask_code: int | None = None
) -> tuple[Tensor, Tensor]:
    """Noisy context: each sequence draws its ratio from U(0, max_ratio), each code is replaced with that probability.

    The new code comes from the whole codebook, so it may be the old one; with `mask_code` it is that one.

    Args:
        codes: (B, N) int.
        uniforms: (B, 2 N + 1) in [0, 1): the ratio, N choices, N new codes.
        max_ratio: f(t) in [0, 1].

    Returns:
        perturbed_codes: (B, N) int.
        perturbation_mask: (B, N) bool, true where a code was drawn anew.
    """
    ratio, choice, draw = uniforms.split([1, codes.shape[1], codes.shape[1]], dim=1)
    perturbation_mask = choice < ratio * max_ratio
    replacement = (draw * codebook_size).to(codes.dtype) if mask_code is None else mask_code
    return torch.where(perturbation_mask, replacement, codes), perturbation_mask


def drop_class_labels(class_labels: Tensor, uniforms: Tensor, probability: float, null_class: int) -> Tensor:
    """Replace labels (B,) by the null class where `uniforms` (B,) fall below `probability`."""
    return torch.where(uniforms < probability, null_class, class_labels)


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits (B, N, V) for clean codes (B, N); computed in float32."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten().long())


def alignment_loss(projection: Tensor, codebook_vectors: Tensor, excluded: Tensor | None = None) -> Tensor:
    """Mean of -cos over all B * N positions.

    Args:
        projection: (B, N, Z) projected hidden states.
        codebook_vectors: (B, N, Z) embeddings of the clean codes.
        excluded: (B, N) bool; such positions count 0 but stay in the divisor B * N, as in the released code.
    """
    cosine = F.cosine_similarity(projection.float(), codebook_vectors.float(), dim=-1)  # (B, N)
    if excluded is not None:
        cosine = cosine.masked_fill(excluded, 0.0)
    return -cosine.mean()


def rear_loss(
    output: ReAROutput, codes: Tensor, codebook_vectors: Tensor, perturbation_mask: Tensor, config: GeneratorConfig
) -> LossTerms:
    """Cross-entropy + transition_alignment_weight * (encode + decode alignment).

    Args:
        output: of the model on the noisy context.
        codes: (B, N) clean codes, the targets.
        codebook_vectors: (B, N, Z) embeddings of `codes`.
        perturbation_mask: (B, N) bool of the noisy context.
    """
    ar_loss = next_token_loss(output.logits, codes)
    proj_loss = torch.zeros_like(ar_loss)
    if output.encode_z is not None:
        excluded = perturbation_mask if config.mask_perturbed_encode else None
        proj_loss = proj_loss + alignment_loss(output.encode_z, codebook_vectors, excluded)
    if output.decode_z is not None:
        proj_loss = proj_loss + alignment_loss(output.decode_z, codebook_vectors)
    correct_tokens = (output.logits.argmax(dim=-1) == codes).float().mean()
    return LossTerms(ar_loss + config.transition_alignment_weight * proj_loss, ar_loss, proj_loss, correct_tokens)
