"""Batches of a data set, read ahead by worker processes.

torch's DataLoader does the work. Added here: one-line errors instead of a worker's traceback, hints for a dead worker
or full shared memory, and no endless wait for a batch after a stop signal.
"""

import errno
import os
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Listener, wait
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from utils.errors import PROCESSES, InputError, TrainingError, environment_error, is_out_of_processes
from utils.images import to_float
from utils.launch_variables import COUNTS, int_variable
from utils.processes import num_cpus
from utils.run.signals import StoppedWaitingError, end_with_parent_only

Batch = dict[str, Tensor]
POLL_SECONDS = 1  # between checks for a stop signal while waiting
PATIENCE_SECONDS = 5  # for a batch to arrive after a stop signal
FILES, FILES_PER_WORKER = 24, 16  # open files: pipes to the workers, and the tensors of batches in flight
SHARED_MEMORY = (
    "shared memory (/dev/shm) is full: make it larger (docker run --shm-size=8g, or --ipc=host) or lower "
    "dataset.params.num_workers_per_gpu or training.per_gpu_batch_size"
)
OPEN_FILES = "too many open files: raise the limit (ulimit -n 65536) or lower dataset.params.num_workers_per_gpu"
MEMORY = "often for lack of memory: lower dataset.params.num_workers_per_gpu or training.per_gpu_batch_size"


class Batches(Iterator[Batch]):
    """The batches of a data set in the order of `batch_sampler`.

    Args:
        dataset: has `__getitems__` for whole batches, or `__getitem__` and `collate`.
        batch_sampler: the items of each batch.
        num_workers: processes that read ahead; 0: this process reads; None: `dataset.workers`, limited by the CPUs.
        pin_memory: for copies to a GPU that do not block.
        stop_requested: whether a stop signal has arrived.

    Raises:
        InputError: from the data set, also in a worker; or shared memory or the limit of open files is too small.
        TrainingError: a worker died.
        StoppedWaitingError: a stop signal arrived, and then no batch for `PATIENCE_SECONDS`.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_sampler: Iterable[list[Any]],
        num_workers: int | None,
        pin_memory: bool = False,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        if num_workers is None:
            num_workers = default_workers(dataset.workers)  # type: ignore[attr-defined]
        if num_workers:
            _check_open_files(num_workers)
            _check_sockets()
        self._stop_requested = stop_requested
        self._stop_seen_at: float | None = None
        loader = DataLoader(
            _ErrorsAsValues(dataset),
            batch_sampler=batch_sampler,
            num_workers=num_workers,
            collate_fn=_identity,
            pin_memory=pin_memory,
            timeout=POLL_SECONDS if num_workers else 0,
            worker_init_fn=end_with_parent_only,
        )
        sigchld_handler = signal.getsignal(signal.SIGCHLD)
        self._batches = iter(loader)
        signal.signal(signal.SIGCHLD, sigchld_handler)  # torch's raises anywhere in the program when a worker dies
        self._workers = getattr(self._batches, "_workers", [])

    def __next__(self) -> Batch:
        while True:
            try:
                batch = next(self._batches)
            except (OSError, RuntimeError, EOFError) as error:
                if self._workers and "DataLoader timed out" in str(error):
                    self._check_wait()
                    continue
                raise self._explained(error) from error
            if isinstance(batch, InputError):
                raise batch
            return batch

    def _check_wait(self) -> None:
        """Raise if no batch will come."""
        pin_memory_thread = getattr(self._batches, "_pin_memory_thread", None)
        if pin_memory_thread is not None and not pin_memory_thread.is_alive():
            raise InputError(OPEN_FILES)  # the thread ends without a message when it cannot open a batch
        if not self._stop_requested():
            return
        if self._stop_seen_at is None:
            self._stop_seen_at = time.monotonic()
        elif time.monotonic() - self._stop_seen_at > PATIENCE_SECONDS:
            for worker in self._workers:
                worker.kill()
            raise StoppedWaitingError

    def _explained(self, error: Exception) -> Exception:
        """The error of a dead worker if there is one, else this one, with a hint where there is one."""
        if self._workers:  # a process that dies closes its connections first and has an exit code later
            wait([worker.sentinel for worker in self._workers], POLL_SECONDS)
        for worker in self._workers:
            if worker.exitcode == -signal.SIGBUS:
                return TrainingError(SHARED_MEMORY)
            if worker.exitcode:
                code, name = worker.exitcode, "a data worker"
                if code > 0:  # libgomp ends a process that cannot start threads
                    return TrainingError(f"{name} ended with exit code {code}; if no reason is above: {PROCESSES}")
                return TrainingError(f"{name} was killed by {signal.Signals(-code).name}, {MEMORY}")
        hint = _hint(error)
        return error if hint is None else InputError(hint)


def read_batch(dataset: Any, items: list[Any]) -> Batch:
    if hasattr(dataset, "__getitems__"):
        return dataset.__getitems__(items)
    return dataset.collate([dataset[item] for item in items])


class _ErrorsAsValues(Dataset):
    """Whole batches of a data set. An error is returned: raised in a worker it would arrive as a traceback."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, items: list[Any]) -> Batch | InputError:
        try:
            batch = read_batch(self.dataset, items)
            if get_worker_info() is not None:
                for values in batch.values():
                    values.share_memory_()  # if this failed later, in torch's sending thread, the batch would be lost
            return batch
        except InputError as error:
            return error
        except (OSError, RuntimeError) as error:
            line = _hint(error) or (environment_error(error) if isinstance(error, OSError) else None)
            if line is None:
                raise
            return InputError(line)


def default_workers(wanted: int) -> int:
    """`wanted`, or the number of CPUs per rank of this machine if that is less; at least 1."""
    ranks_here = int_variable("LOCAL_WORLD_SIZE", default=1, allowed=COUNTS)
    return max(1, min(wanted, num_cpus() // ranks_here))


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device; `image`, sent as uint8 (B, H, W, 3), becomes float32 (B, 3, H, W) in [0, 1]."""
    moved = {key: values.to(device, non_blocking=True) for key, values in batch.items()}
    return moved | {"image": to_float(moved["image"])} if "image" in moved else moved


def _identity(batch: Any) -> Any:
    return batch


def _check_open_files(num_workers: int) -> None:
    """Without this, torch leaves started workers behind when it runs out of files."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    needed = len(os.listdir("/proc/self/fd")) + FILES + FILES_PER_WORKER * num_workers
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise InputError(OPEN_FILES)


def _check_sockets() -> None:
    """Bind a socket as the workers do when they send their first batch: if it failed there, the batch would be lost."""
    try:
        Listener(family="AF_UNIX").close()
    except OSError as error:
        raise InputError(
            f"TMPDIR={tempfile.gettempdir()}: data workers cannot have a socket there ({error}); set TMPDIR to a short "
            "path on a local disk, such as /tmp"
        ) from error


def _hint(error: Exception) -> str | None:
    """What to do about an error of the operating system, as Python or torch words it; None if unknown."""
    text, number = str(error), getattr(error, "errno", None)
    if number in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text or "items of ancdata" in text:
        return OPEN_FILES
    if number == errno.ENOSPC or "No space left on device" in text or "shared memory" in text:
        return SHARED_MEMORY
    return PROCESSES if is_out_of_processes(error) else None
