"""In which order the codes of an image are predicted: for each place of the sequence, which code of the image is there.

Source: RAR (https://arxiv.org/abs/2411.00776). A new order is a function like that below, a line in `ORDERS`, and its
name among the choices of `model.generator.order` and `sampling.order`. Raster order needs no function: it is None.

Legend: B images, N codes per image.
"""

from collections.abc import Callable

import torch
from torch import Tensor

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
        ratio: the share, as `random_order_ratio` gives it.

    Returns:
        (B, N) int64.
    """
    orders = ORDERS[generator.order](uniforms[:, 1:])
    raster = torch.arange(orders.shape[1], device=orders.device)
    return torch.where(uniforms[:, :1] < ratio, orders, raster)


def known_first(known_mask: Tensor, orders: Tensor | None) -> Tensor:
    """Orders (B, N), None for raster, with the codes of `known_mask` (B, N) before all others of their image."""
    if orders is None:
        orders = torch.arange(known_mask.shape[1], device=known_mask.device).expand_as(known_mask)
    unknown = ~known_mask.gather(1, orders)
    return orders.gather(1, unknown.int().argsort(dim=1, stable=True))
