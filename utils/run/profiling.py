"""`training.profile`: a trace of some steps and, on a GPU, a snapshot of its memory, by torch's profiler."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from torch.profiler import profile, record_function

from utils.config import Config
from utils.config_checks import profiled_steps
from utils.distributed import DistributedContext
from utils.files.atomic import atomic_folder
from utils.run.run_environment import log_and_continue


def profiled(steps: Iterable[int], config: Config, ctx: DistributedContext, logger: logging.Logger) -> Iterator[int]:
    """Yield the steps; rank 0 records the steps of `training.profile`, with the work between them.

    After the last recorded step, or at the end of the run, writes `<output_dir>/profile/trace.json.gz` (for
    chrome://tracing or https://ui.perfetto.dev, with a span for each step) and, on a GPU, `memory.pickle` (for
    https://pytorch.org/memory_viz).
    """
    wanted = profiled_steps(config.training) if ctx.is_rank0 else range(0)
    folder = Path(config.experiment.output_dir, "profile")
    numbers = iter(steps)
    for step in numbers:
        if step not in wanted:
            yield step
            continue
        with _recorded(folder, logger):
            for recorded in chain([step], numbers):
                with record_function(f"step {recorded}"):
                    yield recorded
                if recorded + 1 not in wanted:
                    break


@contextmanager
def _recorded(folder: Path, logger: logging.Logger) -> Iterator[None]:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.memory._record_memory_history()
    try:
        with profile() as trace:
            yield
    finally:
        with log_and_continue(logger, f"profile in {folder}"), atomic_folder(folder, replace=True) as partial:
            if on_gpu:
                torch.cuda.memory._dump_snapshot(str(partial / "memory.pickle"))
            trace.export_chrome_trace(str(partial / "trace.json.gz"))
        if on_gpu:
            torch.cuda.memory._record_memory_history(enabled=None)
