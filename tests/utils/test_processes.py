"""Forked workers."""

import time
from pathlib import Path

import pytest
from tqdm import tqdm

from utils.errors import InputError
from utils.processes import in_processes


def test_a_worker_that_is_killed_leaves_the_lock_of_progress_bars_free(tmp_path: Path) -> None:
    """The lock is shared with forked processes; if one dies with it, the next progress bar waits forever."""
    held = tmp_path / "held"
    locks = tqdm.get_lock().locks  # exist before the processes

    def work(chunk: range) -> None:
        if chunk.start == 0:
            with tqdm.get_lock():
                held.touch()
                time.sleep(600)
        while not held.exists():
            time.sleep(0.01)
        raise InputError("the other one is killed")

    with pytest.raises(InputError, match="the other one is killed"):
        list(in_processes(work, [range(1), range(1, 2)], processes=2))
    taken = [lock.acquire(False) for lock in locks]
    for lock, is_taken in zip(locks, taken, strict=True):
        if is_taken:
            lock.release()
    assert all(taken)
