"""Speed and memory of training, for the log."""

import re

import torch

from utils.distributed import DistributedContext
from utils.run.clock import Times

GIB = 2**30
# Dense bf16 peaks in FLOP/s by a part of the device's name, from NVIDIA's data sheets; the first that fits counts.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A40": 150e12,
}


class Performance:
    """
    Args:
        global_batch_size: images per step.
        flops_per_image: of forward and backward pass; None: not told.
    """

    def __init__(self, ctx: DistributedContext, global_batch_size: int, flops_per_image: float | None) -> None:
        self.ctx, self.global_batch_size, self.flops_per_image = ctx, global_batch_size, flops_per_image
        self.on_gpu = ctx.device.type == "cuda"
        self.peak = peak_flops(torch.cuda.get_device_name(ctx.device)) if self.on_gpu else None
        self._retries_seen = 0

    def of_rank(self, times: Times) -> list[float]:
        """What differs between the ranks: seconds of waiting for data, peak memory in bytes since the last call,
        allocations that had to be tried again."""
        if not self.on_gpu:
            return [times.waiting, 0.0, 0.0]
        statistics = torch.cuda.memory_stats(self.ctx.device)
        torch.cuda.reset_peak_memory_stats(self.ctx.device)
        retries = statistics["num_alloc_retries"] - self._retries_seen
        self._retries_seen += retries
        return [times.waiting, statistics["active_bytes.all.peak"], retries]

    def metrics(self, times: Times, of_ranks: list[list[float]]) -> dict[str, float]:
        """By name in the log.

        Args:
            times: of this rank.
            of_ranks: `of_rank` of each.
        """
        found = {"perf/pause_s": times.pauses}
        waiting, peak_memory, retries = zip(*of_ranks, strict=True)
        if self.on_gpu:
            found |= {"perf/memory_gib": max(peak_memory) / GIB, "perf/alloc_retries": sum(retries)}
        if times.steps == 0:
            return found
        per_gpu = times.steps * self.global_batch_size / self.ctx.size / times.in_steps
        found |= {
            "perf/images_per_s": per_gpu * self.ctx.size,
            "perf/images_per_s_per_gpu": per_gpu,
            "perf/step_ms": 1000 * times.in_steps / times.steps,
            "perf/data_wait_pct": 100 * max(waiting) / times.in_steps,
        }
        if self.peak is not None and self.flops_per_image is not None:
            found["perf/mfu_pct"] = 100 * self.flops_per_image * per_gpu / self.peak
        return found


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU; None: not known here."""
    if "MIG" in device_name:  # a part of a GPU
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)
