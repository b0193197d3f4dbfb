"""Timing, memory and the machine's ceilings, for the benchmarks."""

import resource
import statistics
import time
from collections.abc import Callable, Mapping

import torch

CPU_MATMUL, GPU_MATMUL = 1024, 8192  # rows and columns
CPU_COPY_BYTES, GPU_COPY_BYTES = 2**26, 8 * 10**9


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call, until the GPU is done."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def interleaved(functions: Mapping[str, Callable[[], object]], repeats: int, budget: float) -> dict[str, list[float]]:
    """Seconds of each function in `repeats` interleaved rounds; a function skips rounds after `budget` seconds.
    Warm the functions up before."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            if sum(times[name]) < budget:
                times[name].append(seconds(function))
    return times


def describe(times: list[float], unit: float = 1.0) -> str:
    """Median (min - max, number) of seconds divided by `unit`."""
    values = [value / unit for value in times]
    return f"{statistics.median(values):.4g} ({min(values):.4g} - {max(values):.4g}, n={len(values)})"


def peak_memory_mb() -> float:
    """The GPU's peak since the last reset, or this process's peak since its start."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def ceilings() -> dict[str, float]:
    """Measured limits of this machine, per second: `flops` of one matrix product (bf16 on a GPU, float32 on a CPU) and
    `bytes` of one copy, read and written."""
    on_gpu = device().type == "cuda"
    size, copied = (GPU_MATMUL, GPU_COPY_BYTES) if on_gpu else (CPU_MATMUL, CPU_COPY_BYTES)
    a = torch.randn(size, size, device=device(), dtype=torch.bfloat16 if on_gpu else torch.float32)
    source = torch.ones(copied // 4, device=device())
    target = torch.empty_like(source)
    functions = {"flops": lambda: a @ a, "bytes": lambda: target.copy_(source)}
    interleaved(functions, repeats=1, budget=1)
    times = interleaved(functions, repeats=5, budget=30)
    return {"flops": 2 * size**3 / min(times["flops"]), "bytes": 2 * copied / min(times["bytes"])}
