"""The training objective as pure functions of tensors (paper, section 3: https://arxiv.org/abs/2510.04450).

Legend: B images, N codes per image, V codebook size, D hidden size, Z width of a codebook vector, M rows of logits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modeling.robust_embedding import Tap
from utils.token_ids import LOGITS_IN_SLICE

if TYPE_CHECKING:  # the losses need torch only
    from utils.schema import GeneratorConfig

LOGITS_AT_ONCE = 2**22  # in float32
Metric = Tensor | tuple[Tensor, Tensor]  # a mean over the batch, or (sum, count) of a mean over part of it; scalars


@dataclass
class TokenScores:
    """How well logits predict the codes."""

    losses: Tensor  # (B, N) float32, cross-entropies in nats
    correct: Tensor  # (B, N) bool, whether the code has the largest logit


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


def token_scores(logits: Tensor | TokenScores, targets: Tensor) -> TokenScores:
    """Of logits (B, N, V) for clean codes (B, N); scores stay as they are."""
    if isinstance(logits, TokenScores):
        return logits
    return TokenScores(losses=token_losses(logits, targets), correct=logits.argmax(dim=-1) == targets)


def head_scores(head: nn.Module, hidden: Tensor, targets: Tensor) -> TokenScores:
    """`token_scores` of the logits `head(hidden)` for clean codes (B, N), hidden (B, N, D), without ever holding more
    than LOGITS_IN_SLICE logits: the backward pass computes them again, slice by slice."""

    def scores_of(rows: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        scores = token_scores(head(rows)[None], codes[None])
        return scores.losses[0], scores.correct[0]

    size = max(1, LOGITS_IN_SLICE // head.out_features)  # type: ignore[operator]
    slices = zip(hidden.flatten(0, 1).split(size), targets.flatten().split(size), strict=True)
    scores = [checkpoint(scores_of, rows, codes, use_reentrant=False) for rows, codes in slices]
    losses, correct = (torch.cat(values).view(targets.shape) for values in zip(*scores, strict=True))
    return TokenScores(losses, correct)


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of `token_losses`."""
    return token_losses(logits, targets).mean()


def rear_loss(
    logits: Tensor | TokenScores,
    projections: Mapping[str, Tensor],
    codes: Tensor,
    targets: Mapping[str, Tensor],
    perturbation_mask: Tensor,
    taps: Sequence[Tap],
    config: "GeneratorConfig",
) -> LossTerms:
    """Cross-entropy + transition_alignment_weight * weighted sum of the alignment terms of all taps.

    A new term is added to `loss` and to `metrics` here; all metrics are logged as means over steps and ranks.

    Args:
        logits: (B, N, V) of the model on the perturbed context, or the scores of a codebook above LARGE_CODEBOOK.
        projections: by tap, (B, N, Z).
        codes: (B, N) clean codes, the targets.
        targets: by tap, (B, N, Z) target vectors of `codes`; a tap without an entry has ended, and its term is 0.
        perturbation_mask: (B, N) bool, true where the context has another code.
    """
    metrics = dict[str, Metric]()
    scores = token_scores(logits, codes)
    ar_loss = scores.losses.mean()
    proj_loss = torch.zeros_like(ar_loss)
    clean = ~perturbation_mask
    for tap in taps:
        projection = projections[tap.name]
        if tap.name not in targets:
            proj_loss = proj_loss + 0.0 * projection.float().mean()  # DDP requires a gradient of every parameter
            metrics[f"train/{tap.name}_cos"] = ar_loss.new_zeros(()), ar_loss.new_zeros(())  # a mean over nothing: NaN
            continue
        term, cosine = tap.term(projection, targets[tap.name], perturbation_mask)
        proj_loss = proj_loss + tap.weight * term
        cosine = cosine.detach()
        if tap.positions == "own":  # at clean positions; a replaced code cannot be recovered
            metrics[f"train/{tap.name}_cos"] = (cosine * clean).sum(), clean.float().sum()
        else:
            metrics[f"train/{tap.name}_cos"] = cosine.mean()
    loss = ar_loss + config.transition_alignment_weight * proj_loss
    scalars = {
        "train/loss": loss,
        "train/ar_loss": ar_loss,  # cross-entropy, nats per code
        "train/proj_loss": proj_loss,  # weighted sum of the alignment terms; 0 without taps
        "train/correct_tokens": scores.correct.float().mean(),  # top-1 accuracy
    }
    metrics.update({name: value.detach() for name, value in scalars.items()})
    return LossTerms(loss, metrics)
