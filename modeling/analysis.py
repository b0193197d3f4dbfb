"""What a trained model computes on given tokens: predictions by position, hidden states by block.

Legend: B images, N codes per image, T = N + 2 positions, D hidden size, V codebook size, Z width of a codebook vector.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modeling.divergence import conditional_entropy
from modeling.rear import ReAR

CODES_AT_ONCE = 1024  # whose distances to the codebook are in memory together

# Positions of hidden states (B, T, D): where a code is the input, and where it is predicted.
POSITIONS = {"own": slice(2, None), "next": slice(1, -1)}


@dataclass
class Predictions:
    """Predictions of each code from the codes before it in a context, (B, N) float64 on the CPU."""

    correct: Tensor  # 1 where the most probable code is the clean one
    loss: Tensor  # cross-entropy in nats
    entropy: Tensor  # of the prediction, in nats


@torch.inference_mode()
def predictions(model: nn.Module, context: Tensor, codes: Tensor, class_labels: Tensor) -> Predictions:
    """Predict the clean codes (B, N) from a context (B, N), in raster order.

    Args:
        model: called with the context and class labels (B,); in eval mode.
    """
    logits = model(context, class_labels).logits.double()  # (B, N, V)
    log_p = logits.log_softmax(dim=-1)
    return Predictions(
        correct=(logits.argmax(dim=-1) == codes).double().cpu(),
        loss=-log_p.gather(2, codes[..., None])[..., 0].cpu(),
        entropy=conditional_entropy(log_p).cpu(),
    )


@torch.inference_mode()
def hidden_states(model: ReAR, codes: Tensor, class_labels: Tensor) -> list[Tensor]:
    """Outputs (B, T, D) of all blocks for codes (B, N) in raster order."""
    found: list[Tensor] = []

    def keep(block: nn.Module, inputs: Any, output: Tensor) -> None:
        found.append(output)

    hooks = [block.register_forward_hook(keep) for block in model.blocks]
    try:
        model(codes, class_labels)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def nearest_codes(codebook: Tensor) -> Tensor:
    """(V,) of vectors (V, Z): for each code, the other code whose vector is nearest."""
    nearest = []
    for start in range(0, len(codebook), CODES_AT_ONCE):
        distances = torch.cdist(codebook[start : start + CODES_AT_ONCE], codebook)  # (v, V)
        distances.diagonal(start).fill_(torch.inf)
        nearest.append(distances.argmin(dim=1))
    return torch.cat(nearest)


def by_position(values: list[Predictions], get: Callable[[Predictions], Tensor]) -> list[float]:
    """Means over images, (N,)."""
    return torch.cat([get(one) for one in values]).mean(0).tolist()
