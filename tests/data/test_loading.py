"""The loader of all scripts: errors of workers arrive as one line, and nothing waits forever."""

import errno
import multiprocessing
import os
import resource
import signal
import time

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from data import loading
from data.codes.token_store import TokenStore
from data.images.reading import ImageDataset
from data.loading import Batches, default_workers
from utils.errors import InputError, TrainingError
from utils.run.signals import StoppedWaitingError

ITEMS = [[0, 1], [2, 3], [4, 5]]


class Numbers(Dataset):
    """Item i is i; item `at` calls `act` first."""

    collate = staticmethod(default_collate)

    def __init__(self, at: int = -1, act: object = None) -> None:
        self.at, self.act = at, act

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index == self.at:
            self.act()
        return {"index": torch.tensor(index)}


def raises(error: Exception) -> object:
    def act() -> None:
        raise error

    return act


@pytest.fixture(autouse=True)
def no_worker_is_left() -> object:
    before = set(multiprocessing.active_children())
    yield
    for worker in set(multiprocessing.active_children()) - before:
        worker.terminate()  # what Python does at its end
        worker.join(20)
        assert worker.exitcode is not None


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_come_in_order(workers: int) -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    assert [batch["index"].tolist() for batch in Batches(Numbers(), ITEMS, workers)] == ITEMS
    assert signal.getsignal(signal.SIGCHLD) is handler  # torch's handler could raise at any point


@pytest.mark.parametrize(
    ("cpus", "ranks", "images", "codes"), [(4, 1, 4, 2), (64, 1, 12, 2), (64, 8, 8, 2), (1, 2, 1, 1)]
)
def test_workers_follow_from_the_data_and_the_cpus(
    monkeypatch: pytest.MonkeyPatch, cpus: int, ranks: int, images: int, codes: int
) -> None:
    monkeypatch.setattr(loading, "num_cpus", lambda: cpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert default_workers(ImageDataset.workers) == images
    assert default_workers(TokenStore.workers) == codes


def test_without_a_number_the_data_set_gives_it() -> None:
    before, numbers = set(multiprocessing.active_children()), Numbers()
    numbers.workers = 1
    batches = Batches(numbers, ITEMS, None)
    assert len(set(multiprocessing.active_children()) - before) == 1
    assert len(list(batches)) == 3


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InputError("x.png: broken"), r"^x\.png: broken$"),
        (OSError(errno.EMFILE, "Too many open files"), r"ulimit -n .* dataset\.params\.num_workers_per_gpu"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "ulimit -u"),
        (RuntimeError("unable to write to file </torch_1>: No space left on device (28)"), "shm-size"),
    ],
)
def test_an_error_arrives_as_one_line(workers: int, error: Exception, message: str) -> None:
    batches = Batches(Numbers(3, raises(error)), ITEMS, workers)
    assert next(batches)["index"].tolist() == [0, 1]
    with pytest.raises(InputError, match=message) as raised:
        next(batches)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("number", "message"), [(errno.ENOSPC, "shared memory"), (errno.EMFILE, "open files")])
def test_a_batch_that_cannot_be_sent_is_an_error(monkeypatch: pytest.MonkeyPatch, number: int, message: str) -> None:
    def share_memory(tensor: Tensor) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Tensor, "share_memory_", share_memory)
    with pytest.raises(InputError, match=message):
        next(Batches(Numbers(), ITEMS, 1))


@pytest.mark.parametrize(("number", "message"), [(9, "was killed by SIGKILL"), (signal.SIGBUS, "shared memory")])
def test_a_dead_worker_is_named(number: int, message: str) -> None:
    batches = Batches(Numbers(3, lambda: os.kill(os.getpid(), number)), ITEMS, 1)
    with pytest.raises(TrainingError, match=f"{message}.*dataset.params.num_workers_per_gpu"):
        list(batches)  # the first batch may have come, or not


def test_a_worker_that_ends_by_itself_did_not_lack_memory() -> None:
    with pytest.raises(TrainingError, match=r"ended with exit code 1; .*ulimit -u") as error:
        list(Batches(Numbers(3, lambda: os._exit(1)), ITEMS, 1))
    assert "memory" not in str(error.value)


def test_too_few_files_are_noticed_before_workers_start() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, hard))
    try:
        with pytest.raises(InputError, match="too many open files"):
            Batches(Numbers(), ITEMS, 12)
        assert len(list(Batches(Numbers(), ITEMS, 0))) == 3
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_stop_signal_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(loading, "PATIENCE_SECONDS", 0.2)
    batches = Batches(Numbers(3, lambda: time.sleep(600)), ITEMS, 1, stop_requested=lambda: True)
    assert next(batches)["index"].tolist() == [0, 1]
    with pytest.raises(StoppedWaitingError):
        next(batches)


def test_a_slow_batch_comes_without_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "POLL_SECONDS", 0.1)
    assert len(list(Batches(Numbers(3, lambda: time.sleep(1)), ITEMS, 1))) == 3
