"""What the processes of a launch settle before they train: that all are there, and that they agree.

It runs over a store (a small key-value server of rank 0 or of torchrun), not over a process group: a group can only
time out as a whole, while here the rank that is missing or differs is named. And waiting for rank 0 to convert or to
verify files has no time limit.
"""

import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from utils.errors import InputError, TrainingError

T = TypeVar("T")
POLL_S = 5  # seconds between looks at whether rank 0 is still there
NAMED_IN_ERRORS = 3  # differences that an error message spells out


class Launch:
    """The processes that torchrun, or whatever sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, has started.

    Keep it until the end of training: rank 0 may host the store.

    Args:
        timeout_s: how long ranks wait for one another, `training.launch_timeout`.

    Raises:
        TrainingError: rank 0 does not answer, or a rank does not arrive.
    """

    def __init__(self, timeout_s: int) -> None:
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.timeout_s = timeout_s
        self._store = _connect(self.rank, timeout_s) if self.world_size > 1 else None

    def agree(self, topic: str, facts: dict[str, Any]) -> None:
        """Check that `facts`, JSON values, are equal on all ranks.

        Raises:
            TrainingError: a rank did not arrive in time.
            InputError: the first differences, with the rank; on rank 0, the others leave without a message.
        """
        if self._store is None:
            return
        self._store.set(f"{topic}/{self.rank}", json.dumps(facts))
        verdict = self.from_main(f"{topic}/verdict", lambda: self._compare(topic, facts))
        if verdict:
            self.leave()
            raise InputError(verdict) if self.rank == 0 else SystemExit(1)

    def from_main(self, topic: str, make: Callable[[], Any]) -> Any:
        """What `make` gives on rank 0, a JSON value; the others wait for it, however long it takes.

        Raises:
            InputError, TrainingError: from `make`, on rank 0; the others leave without repeating its message.
        """
        if self._store is None:
            return make()
        if self.rank > 0:
            return self._await(topic)
        try:
            result = make()
        except BaseException:
            self._store.set(topic, json.dumps({"failed": True}))
            self.leave()
            raise
        self._store.set(topic, json.dumps({"result": result}))
        return json.loads(json.dumps(result))

    def main_first(self, topic: str, make: Callable[[], T]) -> T:
        """What `make` gives, run on rank 0 and then on the others: what rank 0 converts, they find converted.

        Raises:
            InputError, TrainingError: as `from_main`.
        """
        made: list[T] = []
        self.from_main(topic, lambda: made.append(make()))
        return made[0] if made else make()

    def leave(self) -> None:
        """Rank 0 waits until the others have read what it last wrote, for its end is the end of the store."""
        if self._store is None:
            return
        self._store.set(f"left/{self.rank}", "1")
        if self.rank == 0:
            self._missing("left", time.monotonic() + POLL_S)

    def _compare(self, topic: str, facts: dict[str, Any]) -> str:
        missing = self._missing(topic, time.monotonic() + self.timeout_s)
        if missing:
            raise TrainingError(
                f"launch: of {self.world_size} processes, rank {', '.join(map(str, missing))} did not arrive within "
                f"training.launch_timeout={self.timeout_s} s"
            )
        for rank in range(1, self.world_size):
            theirs = json.loads(self._store.get(f"{topic}/{rank}"))
            differing = [key for key in sorted({*facts, *theirs}) if facts.get(key) != theirs.get(key)]
            if differing:
                lines = [f"{key}={theirs.get(key)} instead of {facts.get(key)}" for key in differing[:NAMED_IN_ERRORS]]
                more = f" and {len(differing) - len(lines)} more" if len(differing) > len(lines) else ""
                return f"launch: rank {rank} differs from rank 0 in its {topic}: {'; '.join(lines)}{more}"
        return ""

    def _missing(self, topic: str, deadline: float) -> list[int]:
        missing = []
        for rank in range(self.world_size):
            left = max(0.01, deadline - time.monotonic())
            try:
                self._store.wait([f"{topic}/{rank}"], timedelta(seconds=left))
            except dist.DistStoreError:
                missing.append(rank)
        return missing

    def _await(self, topic: str) -> Any:
        while True:
            try:
                self._store.wait([topic], timedelta(seconds=POLL_S))
                answer = json.loads(self._store.get(topic))
            except dist.DistStoreError:
                continue  # not yet there; rank 0 may be reading a lot of data
            except dist.DistNetworkError as error:
                raise TrainingError(f"launch: rank {self.rank} lost rank 0 while waiting for its {topic}") from error
            if "failed" in answer:
                self.leave()
                raise SystemExit(1)
            return answer["result"]


def _connect(rank: int, timeout_s: int) -> dist.Store:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    torchrun_hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(
            host,
            port,
            is_master=rank == 0 and not torchrun_hosts,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,  # the process group will use it too
        )
    except dist.DistError as error:
        raise TrainingError(
            f"launch: rank {rank} found no rank 0 at {host}:{port} within training.launch_timeout={timeout_s} s"
        ) from error
    return dist.PrefixStore(f"launch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
