"""Batches for every script that reads data: worker processes whose errors arrive as one line, and which end.

torch's DataLoader does the work. What it does not do by itself:

- An error in a worker comes as a pickled traceback. Here an InputError crosses as its text.
- A batch is sent by a thread of the worker; where that fails (shared memory full, too many open files), the batch is
  lost and the main process waits for ever. Here batches are made ready to send where an error can still be caught.
- A worker that ignores SIGTERM is never ended by Python, which at its exit sends SIGTERM and waits. Here it ends for
  the SIGTERM of its parent and ignores those of others (`utils.run.signals`).
- Waiting for a batch has no end, whatever signal comes. Here a stop signal ends it.
"""

import errno
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data.images.image_source import OUT_OF_FILES
from utils.errors import InputError, TrainingError
from utils.images import to_float
from utils.processes import num_cpus
from utils.run.signals import StoppedWaitingError, end_with_parent_only

Batch = dict[str, Tensor]
POLL_SECONDS = 1  # between looks for a stop signal while waiting
PATIENCE_SECONDS = 5  # in which a batch may still come after a stop signal
FILES, FILES_PER_WORKER = 24, 4  # open at once: pipes to the workers, and the memory of batches on their way
SHARED_MEMORY = (
    "shared memory (/dev/shm) is full: make it larger (docker run --shm-size=8g, or --ipc=host) or lower "
    "dataset.params.num_workers_per_gpu or training.per_gpu_batch_size"
)
OPEN_FILES = "too many open files: raise the limit (ulimit -n 65536) or lower dataset.params.num_workers_per_gpu"
PROCESSES = "no process can be started: lower dataset.params.num_workers_per_gpu"
MEMORY = "often for lack of memory: lower dataset.params.num_workers_per_gpu or training.per_gpu_batch_size"


class Batches(Iterator[Batch]):
    """The batches of a data set in the order of `batch_sampler`, in memory as `dataset.collate` makes them.

    Args:
        batch_sampler: the items of each batch.
        num_workers: processes that read ahead; 0: this one reads; None: as many as `dataset.workers`, if there are
            CPUs for them.
        pin_memory: for copies to a GPU that do not wait.
        stop_requested: whether a stop signal has come.

    Raises:
        InputError: from the data set, in a worker too; or no shared memory, too many open files.
        TrainingError: a worker was killed.
        StoppedWaitingError: a stop signal came while no batch did.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_sampler: Iterable[list[Any]],
        num_workers: int | None,
        pin_memory: bool = False,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self._stop_requested, self._stop_seen = stop_requested, 0.0
        if num_workers is None:
            num_workers = default_workers(dataset.workers)  # type: ignore[attr-defined]
        others = set(multiprocessing.active_children())
        loader = DataLoader(
            _Caught(dataset),
            batch_sampler=batch_sampler,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            pin_memory=pin_memory,
            timeout=POLL_SECONDS if num_workers else 0,
            worker_init_fn=end_with_parent_only,
        )
        if num_workers:
            _check_open_files(FILES + FILES_PER_WORKER * num_workers)
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            self._batches = iter(loader)
        except OSError as error:
            raise _explained(error) or InputError(f"{PROCESSES}: {error}") from error
        finally:
            self._workers = set(multiprocessing.active_children()) - others
            signal.signal(signal.SIGCHLD, handler)  # torch's raises in the middle of anything when a worker dies

    def __next__(self) -> Batch:
        while True:
            try:
                return next(self._batches).open()
            except (OSError, RuntimeError, EOFError) as error:
                if self._workers and "DataLoader timed out" in str(error):
                    self._give_up_after_a_stop()
                    continue
                dead = self._exit_codes(POLL_SECONDS if isinstance(error, EOFError | ConnectionError) else 0)
                raise _of_dead_worker(dead[0]) if dead else _explained(error) or error from error

    def _exit_codes(self, patience: float) -> list[int]:
        """Of workers that have failed. A process that dies loses its connections first and has an exit code later."""
        closed = wait([worker.sentinel for worker in self._workers], patience)
        for worker in self._workers:
            if worker.sentinel in closed:
                worker.join()
        return [worker.exitcode for worker in self._workers if worker.exitcode]

    def _give_up_after_a_stop(self) -> None:
        if not self._stop_requested():
            return
        self._stop_seen = self._stop_seen or time.monotonic()
        if time.monotonic() - self._stop_seen > PATIENCE_SECONDS:
            for worker in self._workers:
                worker.kill()
            raise StoppedWaitingError


def read_batch(dataset: Any, items: list[Any]) -> Batch:
    """Whole batches of a data set, whether it gives them itself or item by item."""
    if hasattr(dataset, "__getitems__"):
        return dataset.__getitems__(items)
    return dataset.collate([dataset[item] for item in items])


class _Caught(Dataset):
    """Whole batches of a data set, each in a message that holds it or the error."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, items: list[Any]) -> "_Message":
        try:
            batch = read_batch(self.dataset, items)
            return _Message(batch) if get_worker_info() is None else _Message(sent=bytes(ForkingPickler.dumps(batch)))
        except InputError as error:
            return _Message(error=str(error))
        except (OSError, RuntimeError) as error:
            explained = _explained(error)
            if explained is None:
                raise
            return _Message(error=str(explained))


@dataclass
class _Message:
    """A batch, a batch on its way between processes, or what went wrong, in one line."""

    batch: Batch | None = None
    sent: bytes = b""
    error: str = ""

    def open(self) -> Batch:
        if self.error:
            raise InputError(self.error)
        return self.batch if self.batch is not None else pickle.loads(self.sent)

    def pin_memory(self) -> "_Message":
        """Called by the DataLoader in a thread of the main process, where nothing can be raised: what fails is left
        as it is, and fails again where it is opened."""
        try:
            return _Message({key: values.pin_memory() for key, values in self.open().items()})
        except (OSError, RuntimeError, EOFError, InputError):
            return self


def default_workers(wanted: int) -> int:
    """So many, or the CPUs of this machine that each of its ranks can have."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(wanted, num_cpus() // ranks_here))


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch there; its `image`, sent as uint8 (B, H, W, 3), as float32 (B, 3, H, W) in [0, 1]."""
    moved = {key: values.to(device, non_blocking=True) for key, values in batch.items()}
    return moved | {"image": to_float(moved["image"])} if "image" in moved else moved


def _as_it_is(message: Any) -> Any:
    return message


def _check_open_files(count: int) -> None:
    """torch leaves half of its workers behind where it runs out of files in the middle."""
    opened = []
    try:
        for _ in range(count):
            opened.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        raise InputError(OPEN_FILES) from error
    finally:
        for descriptor in opened:
            os.close(descriptor)


def _explained(error: Exception) -> InputError | None:
    """What an error of the operating system means, as Python or torch tells it; None: nothing that is known here."""
    text, number = str(error), getattr(error, "errno", None)
    no_answer = isinstance(error, EOFError | ConnectionError)  # of a living worker that was asked for a batch's memory
    if number in OUT_OF_FILES or "Too many open files" in text or "items of ancdata" in text or no_answer:
        return InputError(OPEN_FILES)
    if number == errno.ENOSPC or "No space left on device" in text or "shared memory" in text:
        return InputError(SHARED_MEMORY)
    return None


def _of_dead_worker(exit_code: int) -> TrainingError:
    if exit_code == -signal.SIGBUS:
        return TrainingError(SHARED_MEMORY)
    how = f"was killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"ended with status {exit_code}"
    return TrainingError(f"a data worker {how}, {MEMORY}")
