"""What grows with the codebook: the loss, against torch's on a float32 copy of the logits, and choosing codes.

Random logits, in bf16 as a forward pass in training gives them. The gate before it compares losses and gradients.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from modeling.losses import next_token_loss
from modeling.sampling.generate import filter_logits, sample_codes
from scripts.benchmarks.measure import device, interleaved
from utils.errors import InputError

Losses = dict[str, Callable[[], Tensor]]  # by the name of the way
MAX_LOSS_DIFFERENCE, MAX_GRADIENT_DIFFERENCE = 1e-5, 1e-2  # relative; gradients are in bf16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 16384], help="codes in the codebook")
    parser.add_argument("--batch", type=int, default=4, help="images whose loss is computed, of 256 codes each")
    parser.add_argument("--rows", type=int, default=50, help="images whose next code is chosen")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each way")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All sizes; the figures are those of the last one, all are under `settings`."""
    settings = [measure(size, arguments) for size in arguments.sizes]
    return {"device": device().type, **settings[-1], "settings": settings}


def measure(size: int, arguments: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(0)
    logits = torch.randn(arguments.batch, 256, size, device=device()).to(torch.bfloat16).requires_grad_()
    targets = torch.randint(size, (arguments.batch, 256), device=device())
    ways_of_loss = {"loss": next_token_loss, "loss_copied": copied_loss}
    losses: Losses = {name: partial(loss, logits, targets) for name, loss in ways_of_loss.items()}
    check_equal(losses, logits)
    rows, uniforms = torch.randn(arguments.rows, size, device=device()), torch.rand(arguments.rows, device=device())
    ways: dict[str, Callable[[], object]] = {name: partial(backward, loss, logits) for name, loss in losses.items()}
    for name, top_k, top_p in (("sample", 0, 1.0), ("sample_top_k", 100, 1.0), ("sample_top_p", 0, 0.9)):
        ways[name] = partial(choose, rows, uniforms, top_k, top_p)
    interleaved(ways, 1, budget=60)
    times = interleaved(ways, arguments.repeats, budget=60)
    figures = {f"{name}_ms": statistics.median(values) * 1e3 for name, values in times.items()}
    figures |= {f"{name}_mb": peak_mb(ways[name]) for name in losses}
    print(f"V {size}, loss of {arguments.batch} images, the next code of {arguments.rows}:")
    for name, value in figures.items():
        print(f"  {name:18} {value:.4g}")
    return {"size": size, "ratio_copied": figures["loss_copied_ms"] / figures["loss_ms"], **figures}


def copied_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def backward(loss: Callable[[], Tensor], logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss(), logits)[0]


def choose(logits: Tensor, uniforms: Tensor, top_k: int, top_p: float) -> Tensor:
    return sample_codes(filter_logits(logits, top_k, top_p), uniforms)


def check_equal(losses: Losses, logits: Tensor) -> None:
    """
    Raises:
        InputError: losses or gradients differ.
    """
    ours, wanted = (loss().item() for loss in losses.values())
    if not abs(ours - wanted) <= MAX_LOSS_DIFFERENCE * abs(wanted):
        raise InputError(f"gate: loss {ours:.8g}, expected {wanted:.8g}")
    gradient, expected = (backward(loss, logits).float() for loss in losses.values())
    difference = ((gradient - expected).norm() / expected.norm()).item()
    if not difference <= MAX_GRADIENT_DIFFERENCE:
        raise InputError(f"gate: gradients differ by {difference:.3g} of their norm, expected at most 0.01")


def peak_mb(function: Callable[[], object]) -> float:
    """Memory that a call allocates at a time, at most, beyond what was there."""
    if device().type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())  # type: ignore[union-attr]
    used = list(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
    return max(used) / 1e6
