"""Orders in which the codes of an image are predicted: for each position of the sequence, the index of its code.

Source: RAR (https://arxiv.org/abs/2411.00776). A new order is a function like `random_orders`, a line in `ORDERS`, and
its name among the choices of `model.generator.order` and `sampling.order`. Raster order needs no function: it is None.

Legend: B images, N codes per image.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from modeling.robust_embedding import anneal
from utils.schema import GeneratorConfig

# uniforms (B, N) in [0, 1) -> orders (B, N) int64, each row a permutation of 0 to N - 1
Order = Callable[[Tensor], Tensor]


def random_orders(uniforms: Tensor) -> Tensor:
    """All permutations are equally probable."""
    return uniforms.argsort(dim=1, stable=True)


ORDERS: dict[str, Order] = {"random": random_orders, "annealed": random_orders}


def training_orders(uniforms: Tensor, ratio: float, generator: GeneratorConfig) -> Tensor:
    """The order of `model.generator.order` for a share of the samples, raster order for the others.

    Args:
        uniforms: (B, 1 + N) in [0, 1).
        ratio: the share; see `random_order_ratio`.

    Returns:
        (B, N) int64.
    """
    orders = ORDERS[generator.order](uniforms[:, 1:])
    raster = torch.arange(orders.shape[1], device=orders.device)
    return torch.where(uniforms[:, :1] < ratio, orders, raster)


def num_order_uniforms(generator: GeneratorConfig) -> int:
    """Uniforms of an image for `training_orders`; 0 for raster order."""
    return 0 if generator.order == "raster" else 1 + generator.image_seq_len


def random_order_ratio(step: int, generator: GeneratorConfig) -> float:
    """Share of the samples that are not in raster order: annealed for `order=annealed`, else 0 or 1."""
    if generator.order == "annealed":
        return anneal(step, generator.order_anneal_start, generator.order_anneal_end)
    return float(generator.order != "raster")


def conditioning_first(mask: Tensor, orders: Tensor | None) -> Tensor:
    """Orders (B, N), None for raster, with the codes of `mask` (B, N) before all others of their image."""
    if orders is None:
        orders = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    sampled = ~mask.gather(1, orders)
    return orders.gather(1, sampled.int().argsort(dim=1, stable=True))
