"""The training objective as pure functions of tensors (paper, section 3: https://arxiv.org/abs/2510.04450).

Legend: B images, N codes per image, V codebook size, Z width of a codebook vector, M rows of logits.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modeling.robust_embedding import alignment_loss, cosine_to_codes

if TYPE_CHECKING:  # the losses need torch only
    from utils.schema import GeneratorConfig

LOGITS_AT_ONCE = 2**22  # in float32
Metric = Tensor | tuple[Tensor, Tensor]  # a mean over the batch, or (sum, count) of a mean over part of it; scalars


@dataclass
class LossTerms:
    """Scalars of a micro-batch."""

    loss: Tensor
    metrics: dict[str, Metric]  # logged values by key, without gradients


class CrossEntropy(torch.autograd.Function):
    """`F.cross_entropy` (M,) in float32 of logits (M, V) of any float type for targets (M,). Rows are converted to
    float32 in chunks, and no copy of the logits is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.rows_at_once = max(1, LOGITS_AT_ONCE // logits.shape[1])
        log_sums = torch.cat([rows.float().logsumexp(dim=1) for rows in logits.split(ctx.rows_at_once)])
        ctx.save_for_backward(logits, targets, log_sums)
        return log_sums - logits.gather(1, targets[:, None])[:, 0].float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, targets, log_sums = ctx.saved_tensors
        result = torch.empty_like(logits)
        for start in range(0, len(logits), ctx.rows_at_once):
            rows = slice(start, start + ctx.rows_at_once)
            probabilities = (logits[rows].float() - log_sums[rows, None]).exp()
            target = targets[rows, None]
            at_target = probabilities.gather(1, target) - 1
            result[rows] = probabilities.scatter_(1, target, at_target).mul_(grad[rows, None])
        return result, None


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropies (B, N) float32, in nats, of logits (B, N, V) for clean codes (B, N)."""
    return CrossEntropy.apply(logits.flatten(0, 1), targets.flatten().long()).view(targets.shape)


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of `token_losses`."""
    return token_losses(logits, targets).mean()


def rear_loss(
    logits: Tensor,
    encode_z: Tensor | None,
    decode_z: Tensor | None,
    codes: Tensor,
    codebook_vectors: Tensor,
    perturbation_mask: Tensor,
    config: "GeneratorConfig",
) -> LossTerms:
    """Cross-entropy + transition_alignment_weight * (encode + decode alignment).

    A new term is added to `loss` and to `metrics` here; all metrics are logged as means over steps and ranks.

    Args:
        logits: (B, N, V) of the model on the perturbed context.
        encode_z, decode_z: (B, N, Z) projections; None: without the term.
        codes: (B, N) clean codes, the targets.
        codebook_vectors: (B, N, Z) embeddings of `codes`.
        perturbation_mask: (B, N) bool, true where the context has another code.
    """
    metrics = dict[str, Metric]()
    ar_loss = next_token_loss(logits, codes)
    proj_loss = torch.zeros_like(ar_loss)
    if encode_z is not None:
        cosine = cosine_to_codes(encode_z, codebook_vectors)
        proj_loss = proj_loss + alignment_loss(cosine, perturbation_mask if config.mask_perturbed_encode else None)
        clean = ~perturbation_mask
        metrics["train/encode_cos"] = (cosine.detach() * clean).sum(), clean.float().sum()  # at clean positions
    if decode_z is not None:
        cosine = cosine_to_codes(decode_z, codebook_vectors)
        proj_loss = proj_loss + alignment_loss(cosine)
        metrics["train/decode_cos"] = cosine.detach().mean()
    loss = ar_loss + config.transition_alignment_weight * proj_loss
    scalars = {
        "train/loss": loss,
        "train/ar_loss": ar_loss,  # cross-entropy, nats per code
        "train/proj_loss": proj_loss,  # encode + decode alignment, before the weight; 0 without regularization
        "train/correct_tokens": (logits.argmax(dim=-1) == codes).float().mean(),  # top-1 accuracy
    }
    metrics.update({name: value.detach() for name, value in scalars.items()})
    return LossTerms(loss, metrics)
