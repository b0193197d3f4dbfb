"""Divergences of the distributions that two models define over the tokens of an image, exact in each next token.

By the chain rule, KL(p || q) of sequences is the sum over positions k of the mean, over contexts x1 .. xk-1 from p, of
KL(p(. | context) || q(. | context)). The inner one is summed over the codebook, so only contexts are sampled.

Legend: B sequences, N codes each, V codebook size. Values are in nats.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from modeling.rear import ReAR

LOGITS_AT_ONCE = 2**23  # in float64


def conditional_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) (B, N) of log-probabilities (B, N, V); a code that p excludes adds 0."""
    probabilities = log_p.exp()
    return torch.where(probabilities > 0, probabilities * (log_p - log_q), 0.0).sum(dim=-1)


def conditional_entropy(log_p: Tensor) -> Tensor:
    """Entropy (B, N) of log-probabilities (B, N, V)."""
    probabilities = log_p.exp()
    return -torch.where(probabilities > 0, probabilities * log_p, 0.0).sum(dim=-1)


def log_probabilities(model: ReAR, codes: Tensor, class_labels: Tensor) -> Tensor:
    """(B, N, V) float64, of each next token given the codes (B, N) before it and the class (B,), in raster order."""
    return model(codes, class_labels).logits.double().log_softmax(dim=-1)


@dataclass(frozen=True)
class Divergences:
    """Divergences between the models p and q, (B, N) on the CPU, for each context of some sequences."""

    p_to_q: Tensor  # KL(p || q)
    q_to_p: Tensor  # KL(q || p)


@torch.inference_mode()
def divergences(p: ReAR, q: ReAR, codes: Tensor, class_labels: Tensor) -> Divergences:
    """Divergences for the contexts in codes (B, N) of classes (B,); models in eval mode."""
    parts = []
    for rows, labels in _split(p, codes, class_labels):
        log_p, log_q = (log_probabilities(model, rows, labels) for model in (p, q))
        parts.append((conditional_kl(log_p, log_q), conditional_kl(log_q, log_p)))
    p_to_q, q_to_p = (torch.cat(values).cpu() for values in zip(*parts, strict=True))
    return Divergences(p_to_q, q_to_p)


@torch.inference_mode()
def entropies(p: ReAR, codes: Tensor, class_labels: Tensor) -> Tensor:
    """Entropies (B, N) on the CPU of the next token, for the contexts in codes (B, N) of classes (B,)."""
    batches = _split(p, codes, class_labels)
    return torch.cat([conditional_entropy(log_probabilities(p, rows, labels)) for rows, labels in batches]).cpu()


def _split(model: ReAR, codes: Tensor, class_labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Codes (B, N) and class labels (B,) in parts whose logits fit in memory."""
    size = max(1, LOGITS_AT_ONCE // (codes.shape[1] * model.codebook_size))
    return zip(codes.split(size), class_labels.split(size), strict=True)
