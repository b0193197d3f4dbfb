"""The decoding step as CUDA graphs: one launch per step instead of several hundred."""

from collections.abc import Callable

import torch


class StepGraphs:
    """One graph for each length of attention, of the current device; they share memory, since only one runs at a time.

    Args:
        step: a step with attention over the given number of positions. It reads and writes buffers that keep their
            addresses, and never waits for the GPU. It runs once for each length, to load what must not be captured.
        ends: the lengths of attention, ascending.

    Raises:
        RuntimeError: an operation of the step cannot be captured.
    """

    def __init__(self, step: Callable[[int], object], ends: list[int]) -> None:
        self.device = torch.cuda.current_device()
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for end in ends:
                step(end)
        current.wait_stream(side)
        pool = torch.cuda.graph_pool_handle()
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        for end in reversed(ends):  # the largest first: the others fit into its memory
            self.graphs[end] = torch.cuda.CUDAGraph()
            # Other threads, such as a decoder's, may do what a capture forbids.
            with torch.cuda.graph(self.graphs[end], pool=pool, capture_error_mode="thread_local"):
                step(end)

    def __del__(self) -> None:
        torch.cuda.synchronize(self.device)  # replays may still run

    def replay(self, end: int) -> None:
        self.graphs[end].replay()
