"""Collective operations of the processes of one evaluation."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from utils.distributed import Distributed
from utils.errors import InputError

T = TypeVar("T")


def sum_over_ranks(tensor: Tensor, world: Distributed) -> Tensor:
    """The sum over all processes, on each of them; dtype, shape and device of `tensor`."""
    if world.world_size == 1:
        return tensor
    total = tensor.to(world.device, copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)


def main_process_first(world: Distributed, action: Callable[[], T]) -> T:
    """Run `action` on rank 0, then on the others. If it fails there, they leave without repeating its message.

    Raises:
        InputError: from `action`.
    """
    error, result = None, None
    if world.is_main_process:
        try:
            result = action()
        except InputError as caught:
            error = caught
    failed = sum_over_ranks(torch.tensor(float(error is not None)), world)
    if error is not None:
        raise error
    if failed:
        raise SystemExit(1)
    return result if world.is_main_process else action()
