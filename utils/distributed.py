"""Rank and device of this process, and collective operations of all processes of a launch.

Every script calls `init_distributed`, with or without a launcher. All ranks first meet at a key-value store (of
torchrun or rank 0), so that an error can name a missing rank. accelerate's `PartialState` and torch's
`monitored_barrier` cannot. `PartialState` also takes WORLD_SIZE=2 without LOCAL_RANK for two single processes and sets
the number of CPU threads.
"""

import ctypes
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from utils.errors import InputError, TrainingError
from utils.files.lock import only_writer
from utils.files.provenance import differences
from utils.launch_variables import PORTS, int_variable, launch_environment

P = ParamSpec("P")
T = TypeVar("T")
LAUNCH_TIMEOUT_S = 120  # until all ranks have arrived
GROUP_TIMEOUT_S = 600  # after which a rank that does not answer in a reduction is considered dead
NO_LIMIT = timedelta(days=30)
REREAD_NUMBERS = timedelta(seconds=1)  # see `_meet`
GROUP_THREADS_S = 0.2  # see `_never_free`
MAX_REPORTED = 3  # differences between ranks in an error message
FLIGHT_RECORDER = {
    "TORCH_FR_BUFFER_SIZE": "2000",  # reductions
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_FR_DUMP_TEMP_FILE": "{folder}/nccl_trace_rank_",
}
if torch.__version__ < "2.11":  # newer releases warn of these names
    FLIGHT_RECORDER["TORCH_NCCL_TRACE_BUFFER_SIZE"] = FLIGHT_RECORDER["TORCH_FR_BUFFER_SIZE"]
    FLIGHT_RECORDER["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] = FLIGHT_RECORDER["TORCH_FR_DUMP_TEMP_FILE"]


@dataclass(frozen=True)
class DistributedContext:
    """This process among all processes of a launch. Methods are collective: all ranks must call them.

    Reductions time out after `group_timeout` of `init_distributed`. The other methods wait for rank 0's file work
    without a limit; if a rank dies meanwhile, the others end at once.
    """

    rank: int
    size: int
    device: torch.device
    no_timeout_group: Any = None  # gloo, without a time limit; None for a single process

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    def print_on_rank0(self, line: str) -> None:
        if self.is_rank0:
            print(line, flush=True)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, with dtype, shape and device of `values`, which stays unchanged."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def all_reduce_max(self, values: Tensor) -> Tensor:
        """The element-wise maximum over all ranks; `values` stays unchanged."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size == 1:
            return values
        result = values.to(self.device, copy=True)
        dist.all_reduce(result, operation)
        return result.to(values.device)

    def barrier(self) -> None:
        """Wait for all ranks, without a limit."""
        if self.size > 1:
            dist.barrier(group=self.no_timeout_group)

    def broadcast_from_rank0(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function` on rank 0 only; returns its result, pickled, on all ranks. Rank 0 raises its exceptions; the
        other ranks exit without a message."""
        if self.size == 1:
            return function(*args, **kwargs)
        results: list[Any] = [None]
        with self._exit_together():
            if self.is_rank0:
                results[0] = function(*args, **kwargs)
        dist.broadcast_object_list(results, src=0, group=self.no_timeout_group)
        return results[0]

    def rank0_first(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function` on rank 0, then on the others, which find the files that rank 0 has converted. Exceptions are
        raised where they occurred; the other ranks exit without a message."""
        with self._exit_together():
            if self.is_rank0:
                result = function(*args, **kwargs)
        with self._exit_together():
            if not self.is_rank0:
                result = function(*args, **kwargs)
        return result

    @contextmanager
    def locked(self, path: Path, inside: bool = False) -> Iterator[None]:
        """Hold the lock of `path` (see `only_writer`) on rank 0, for all ranks. If another launch holds it, rank 0
        raises InputError and the other ranks exit without a message."""
        with ExitStack() as lock:
            with self._exit_together():
                if self.is_rank0:
                    lock.enter_context(only_writer(path, inside))
            yield

    def assert_same_on_all_ranks(self, topic: str, facts: dict[str, Any]) -> None:
        """If `facts` differ between ranks, rank 0 raises InputError and the other ranks exit without a message."""
        if self.size == 1:
            return
        of_ranks: list[dict[str, Any]] = [{}] * self.size
        dist.all_gather_object(of_ranks, facts, group=self.no_timeout_group)
        with self._exit_together():
            for rank, found in enumerate(of_ranks if self.is_rank0 else []):
                if different := differences(found, expected=of_ranks[0]):
                    more = f" and {len(different) - MAX_REPORTED} more" if len(different) > MAX_REPORTED else ""
                    named = "; ".join(different[:MAX_REPORTED])
                    raise InputError(f"launch: rank {rank} differs from rank 0 in {topic}: {named}{more}")

    @contextmanager
    def _exit_together(self) -> Iterator[None]:
        """Wait for all ranks at the end; if one of them failed inside, the others exit without a message."""
        failed = True
        try:
            yield
            failed = False
        finally:
            if self.size > 1:
                any_failed = torch.tensor(failed, dtype=torch.uint8)
                dist.all_reduce(any_failed, dist.ReduceOp.MAX, group=self.no_timeout_group)
                if any_failed and not failed:
                    raise SystemExit(1)


@contextmanager
def init_distributed(
    launch_timeout: int = LAUNCH_TIMEOUT_S, group_timeout: int = GROUP_TIMEOUT_S, traces: Path | None = None
) -> Iterator[DistributedContext]:
    """Form a process group with all ranks, nccl on GPUs and gloo on CPU, and leave it at the end.

    Args:
        launch_timeout: seconds within which all ranks must arrive.
        group_timeout: seconds after which a rank that does not answer in a reduction is considered dead.
        traces: folder for NCCL flight-recorder traces after a timeout (`nccl_trace_rank_<rank>`, read by
            `torchfrtrace`).

    Raises:
        InputError: environment variables of a launch that are missing or invalid.
        TrainingError: rank 0 does not answer, or a rank does not arrive.
    """
    rank, size, local_rank = launch_environment()
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"LOCAL_RANK={local_rank} in the environment: found {torch.cuda.device_count()} GPUs, expected one for "
                "each process of this machine"
            )
        torch.cuda.set_device(device)
    if size == 1:
        yield DistributedContext(rank=0, size=1, device=device)
        return
    if traces is not None:
        for name, value in FLIGHT_RECORDER.items():
            os.environ.setdefault(name, value.format(folder=traces))
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=_meet(rank, size, launch_timeout),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=group_timeout),
    )
    no_timeout_group = dist.new_group(backend="gloo", timeout=NO_LIMIT)
    _never_free(dist.group.WORLD)
    _never_free(no_timeout_group)
    try:
        yield DistributedContext(rank, size, device, no_timeout_group)
        dist.destroy_process_group()  # not after an error: it may wait for the rank that is gone
    finally:
        time.sleep(GROUP_THREADS_S)


def _never_free(group: object) -> None:
    """Leak a reference to `group`: a process sometimes hangs at exit otherwise.

    torch (2.6 at least) frees a gloo group with the GIL held and joins its threads, of which one may wait for the GIL
    to free its last tensor. A leaked thread must finish before the interpreter ends, which would abort the process;
    `GROUP_THREADS_S` is its time for that.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


def _meet(rank: int, size: int, timeout_s: int) -> dist.Store:
    """The store of this launch, after all ranks have arrived; raises TrainingError without one, or without all ranks in
    time. Keep a reference: rank 0 may host the store.

    torchrun's store outlives its workers, and after a restart it still holds the entries of the last ones. Each process
    therefore writes a number of its own, and a launch is a set of processes that have all read the same numbers.
    TORCHELASTIC_RESTART_COUNT does not identify a launch: it may differ between machines.
    """
    host, port = os.environ["MASTER_ADDR"], int_variable("MASTER_PORT", default=0, allowed=PORTS)
    hosts_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun does
    deadline = time.monotonic() + timeout_s
    try:
        server: dist.Store = dist.TCPStore(
            host, port, is_master=hosts_store, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
        )
    except RuntimeError as error:  # DistError; plain RuntimeError in torch 2.6
        reason = str(error).splitlines()[0]
        raise TrainingError(
            f"launch: rank {rank} could not use {host}:{port} within training.launch_timeout={timeout_s} s, expected "
            f"{'a free MASTER_PORT' if hosts_store else 'rank 0 there'}: {reason}"
        ) from error
    processes = [f"process/{other}" for other in range(size)]
    arrived = [f"arrived/{other}" for other in range(size)]
    server.set(processes[rank], uuid4().hex)
    store = server
    while time.monotonic() < deadline:
        with suppress(dist.DistStoreError):  # timed out; a rank that was restarted has another number now
            server.wait(processes, REREAD_NUMBERS)
            numbers = b"".join(server.multi_get(processes))
            store = dist.PrefixStore(f"launch/{hashlib.sha256(numbers).hexdigest()}", server)
            store.set(arrived[rank], "")
            store.wait(arrived, REREAD_NUMBERS)
            return store
    never_started = [str(other) for other in range(size) if not server.check([processes[other]])]
    missing = never_started or [str(other) for other in range(size) if not store.check([arrived[other]])]
    raise TrainingError(
        f"launch: of {size} processes, rank {', '.join(missing)} did not arrive within "
        f"training.launch_timeout={timeout_s} s"
    )
