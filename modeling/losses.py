"""The training objective as pure functions of tensors (paper, section 3: https://arxiv.org/abs/2510.04450).

Legend: B images, N codes per image, V codebook size, Z width of a codebook vector, M rows of logits.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modeling.rear import ReAROutput
from modeling.robust_embedding import alignment_loss, cosine_to_codes
from utils.schema import GeneratorConfig

LOGITS_AT_ONCE = 2**22  # in float32
Metric = Tensor | tuple[Tensor, Tensor]  # a scalar, or the (sum, count) of a mean


@dataclass
class LossTerms:
    """Scalars of a micro-batch."""

    loss: Tensor  # what is minimized
    metrics: dict[str, Metric]  # what is logged, by name in the log, without gradients


class CrossEntropy(torch.autograd.Function):
    """`F.cross_entropy` in float32, (M,), of logits (M, V) of any float type for targets (M,). Only some rows at a
    time are in float32, and for the backward pass no copy of the logits is kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.rows_at_once = max(1, LOGITS_AT_ONCE // logits.shape[1])
        log_sums = torch.cat([rows.float().logsumexp(dim=1) for rows in logits.split(ctx.rows_at_once)])
        ctx.save_for_backward(logits, targets, log_sums)
        return log_sums - logits.gather(1, targets[:, None])[:, 0].float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, targets, log_sums = ctx.saved_tensors
        result, columns = torch.empty_like(logits), (tensor[:, None] for tensor in (targets, log_sums, grad))
        pieces = (tensor.split(ctx.rows_at_once) for tensor in (result, logits, *columns))
        for out, rows, target, log_sum, of_loss in zip(*pieces, strict=True):
            probabilities = (rows.float() - log_sum).exp()
            at_target = probabilities.gather(1, target) - 1
            out.copy_(probabilities.scatter_(1, target, at_target).mul_(of_loss))
        return result, None


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropies (B, N) float32, in nats, of logits (B, N, V) for clean codes (B, N)."""
    return CrossEntropy.apply(logits.flatten(0, 1), targets.flatten().long()).view(targets.shape)


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of `token_losses`."""
    return token_losses(logits, targets).mean()


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
    proj_loss, cosines = torch.zeros_like(ar_loss), dict[str, Metric]()
    if output.encode_z is not None:
        cosine = cosine_to_codes(output.encode_z, codebook_vectors)
        proj_loss = proj_loss + alignment_loss(cosine, perturbation_mask if config.mask_perturbed_encode else None)
        clean = ~perturbation_mask
        cosines["train/encode_cos"] = ((cosine.detach() * clean).sum(), clean.float().sum())  # of clean positions
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
