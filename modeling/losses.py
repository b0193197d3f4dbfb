"""The training objective as pure functions of tensors (paper, section 3: https://arxiv.org/abs/2510.04450).

Legend: B images, N codes per image, V codebook size, Z width of a codebook vector. Random numbers come in as
uniforms in [0, 1), so that a result depends on its arguments only.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.rear import ReAROutput
from utils.run.interval import Ratio
from utils.schema import GeneratorConfig


@dataclass
class LossTerms:
    """Scalars of a micro-batch."""

    loss: Tensor  # what is minimized
    metrics: dict[str, Tensor | Ratio]  # what is logged, by name in the log, without gradients


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits (B, N, V) for clean codes (B, N); computed in float32."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten().long())


def cosine_to_codes(projection: Tensor, codebook_vectors: Tensor) -> Tensor:
    """(B, N) float32 cosines of projected hidden states (B, N, Z) and the embeddings (B, N, Z) of the clean codes."""
    return F.cosine_similarity(projection.float(), codebook_vectors.float(), dim=-1)


def alignment_loss(cosine: Tensor, excluded: Tensor | None = None) -> Tensor:
    """Mean of -cos over all B * N positions.

    Args:
        cosine: (B, N).
        excluded: (B, N) bool; such positions add 0, and the divisor stays B * N, as in the released code.
    """
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

    A new term is added to `loss` and to `metrics` here; whatever `metrics` holds is logged, as the mean of the steps.
    """
    ar_loss = next_token_loss(output.logits, codes)
    proj_loss, cosines = torch.zeros_like(ar_loss), dict[str, Tensor | Ratio]()
    if output.encode_z is not None:
        cosine = cosine_to_codes(output.encode_z, codebook_vectors)
        proj_loss = proj_loss + alignment_loss(cosine, perturbation_mask if config.mask_perturbed_encode else None)
        clean = ~perturbation_mask
        cosines["train/encode_cos"] = Ratio((cosine.detach() * clean).sum(), clean.float().sum())  # of clean positions
    if output.decode_z is not None:
        cosine = cosine_to_codes(output.decode_z, codebook_vectors)
        proj_loss = proj_loss + alignment_loss(cosine)
        cosines["train/decode_cos"] = cosine.detach().mean()
    loss = ar_loss + config.transition_alignment_weight * proj_loss
    metrics = {
        "train/loss": loss,
        "train/ar_loss": ar_loss,  # cross-entropy, nats per code
        "train/proj_loss": proj_loss,  # encode + decode alignment, before the weight; 0 without regularization
        "train/correct_tokens": (output.logits.argmax(dim=-1) == codes).float().mean(),  # share of right guesses
    }
    return LossTerms(loss, cosines | {name: value.detach() for name, value in metrics.items()})
