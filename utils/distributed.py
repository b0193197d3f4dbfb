"""The processes of a launch: which one this is, and what they do together.

Every script calls `init_distributed`, whether it was started by torchrun, by accelerate or alone. All processes first
meet at a store (a small key-value server of rank 0 or of torchrun): a process group can only time out as a whole, but
the store knows which rank is missing.
"""

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from utils.errors import InputError, TrainingError

T = TypeVar("T")
LAUNCH_TIMEOUT_S = 120  # until all processes have met
GROUP_TIMEOUT_S = 600  # until a rank that does not answer in a collective is taken for dead
NO_LIMIT = timedelta(days=30)
THREADS_REST_S = 0.2  # at the end, for the threads of the group: see `_keep_to_the_end`
NAMED_IN_ERRORS = 3  # differences that an error message spells out
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
FLIGHT_RECORDER = {
    "TORCH_FR_BUFFER_SIZE": "2000",  # reductions
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_FR_DUMP_TEMP_FILE": "{folder}/nccl_trace_rank_",
}
if torch.__version__ < "2.11":  # newer releases warn of these names
    FLIGHT_RECORDER["TORCH_NCCL_TRACE_BUFFER_SIZE"] = FLIGHT_RECORDER["TORCH_FR_BUFFER_SIZE"]
    FLIGHT_RECORDER["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] = FLIGHT_RECORDER["TORCH_FR_DUMP_TEMP_FILE"]
# What accelerate's config file or options set for a program that leaves training to accelerate, as this one does not.
LAUNCHER_SETTINGS = {
    "ACCELERATE_USE_DEEPSPEED": ("false", "torch's own DDP is used; training.fsdp=true shards"),
    "ACCELERATE_USE_FSDP": ("false", "training.fsdp=true shards"),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "torch's own DDP is used; training.fsdp=true shards"),
    "ACCELERATE_MIXED_PRECISION": ("no", "training.mixed_precision alone counts"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "nothing is compiled by it"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "training.gradient_accumulation_steps alone counts"),
}


@dataclass(frozen=True)
class DistributedContext:
    """All processes of a launch, seen by one of them. Every method but the properties is called by all of them.

    Reductions end after `group_timeout`, for nothing but a dead or hanging rank makes them wait. Waiting for what rank
    0 does with files has no limit; a rank that dies meanwhile ends the others at once.
    """

    rank: int
    size: int
    device: torch.device
    no_timeout_group: Any = None  # a gloo group without a time limit; None for a single process

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, on each of them; dtype, shape and device of `values`, which stays as it is."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def all_reduce_max(self, values: Tensor) -> Tensor:
        """The largest value over all processes, element by element; `values` stays as it is."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size == 1:
            return values
        result = values.to(self.device, copy=True)
        dist.all_reduce(result, operation)
        return result.to(values.device)

    def barrier(self) -> None:
        """Wait for all, without a limit."""
        if self.size > 1:
            dist.barrier(group=self.no_timeout_group)

    def broadcast_from_rank0(self, make: Callable[[], T]) -> T:
        """What `make` gives on rank 0, pickled to the others.

        Raises:
            Exception: from `make`, on rank 0; the others leave without repeating its message.
        """
        made = self._attempt(make) if self.is_rank0 else (None, None)
        if self.size > 1:
            sent = [(made[0], made[1] is not None)]
            dist.broadcast_object_list(sent, src=0, group=self.no_timeout_group)
            if not self.is_rank0:
                made = (sent[0][0], SystemExit(1) if sent[0][1] else None)
        return self._result(made)

    def rank0_first(self, make: Callable[[], T]) -> T:
        """What `make` gives here, run on rank 0 and then on the others: what rank 0 converts, they find converted.

        Raises:
            Exception: from `make`, where it failed; the other ranks leave without a message.
        """
        made: list[T] = []
        self.broadcast_from_rank0(lambda: made.append(make()))
        if self.size == 1:
            return made[0]
        result = (made[0], None) if made else self._attempt(make)
        failed = [False] * self.size
        dist.all_gather_object(failed, result[1] is not None, group=self.no_timeout_group)
        if any(failed) and result[1] is None:
            raise SystemExit(1)
        return self._result(result)

    def assert_same_on_all_ranks(self, topic: str, facts: dict[str, Any]) -> None:
        """Check that `facts` are equal on all ranks.

        Raises:
            InputError: the first differences, with the rank; on rank 0, the others leave without a message.
        """
        if self.size == 1:
            return
        of_ranks: list[dict[str, Any]] = [{}] * self.size
        dist.all_gather_object(of_ranks, facts, group=self.no_timeout_group)
        for rank, theirs in enumerate(of_ranks):
            ours = of_ranks[0]
            differing = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
            if differing:
                lines = [f"{key}={theirs.get(key)} instead of {ours.get(key)}" for key in differing[:NAMED_IN_ERRORS]]
                more = f" and {len(differing) - len(lines)} more" if len(differing) > len(lines) else ""
                message = f"launch: rank {rank} differs from rank 0 in its {topic}: {'; '.join(lines)}{more}"
                raise InputError(message) if self.is_rank0 else SystemExit(1)

    @staticmethod
    def _attempt(make: Callable[[], T]) -> tuple[T | None, BaseException | None]:
        try:
            return make(), None
        except BaseException as error:  # the other ranks must learn of it, whatever it is
            return None, error

    @staticmethod
    def _result(made: tuple[Any, BaseException | None]) -> Any:
        if made[1] is not None:
            raise made[1]
        return made[0]


@contextmanager
def init_distributed(
    launch_timeout: int = LAUNCH_TIMEOUT_S, group_timeout: int = GROUP_TIMEOUT_S, traces: Path | None = None
) -> Iterator[DistributedContext]:
    """Meet the other processes and form a group with them: nccl on GPUs, gloo on CPU. The group is left at the end.

    Args:
        launch_timeout: seconds in which all processes must have met.
        group_timeout: seconds after which a rank that does not answer in a reduction is taken for dead.
        traces: folder in which every rank then leaves its last reductions (`nccl_trace_rank_<rank>`, of NCCL's flight
            recorder; torch's `torchfrtrace` reads them).

    Raises:
        InputError: environment variables of a launch that are missing or no numbers.
        TrainingError: rank 0 does not answer, or a rank does not arrive.
    """
    rank, size, local_rank = launch_environment()
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda" and local_rank >= torch.cuda.device_count():
        raise InputError(
            f"LOCAL_RANK={local_rank} in the environment: found {torch.cuda.device_count()} GPUs here, expected one "
            "for each process"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1:
        yield DistributedContext(0, 1, device)
        return
    if traces is not None:
        for name, value in FLIGHT_RECORDER.items():
            os.environ.setdefault(name, value.format(folder=traces))
    store = _meet(rank, size, launch_timeout)
    backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=group_timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    no_timeout_group = dist.new_group(backend="gloo", timeout=NO_LIMIT)
    for group in (dist.group.WORLD, no_timeout_group):
        _keep_to_the_end(group)
    try:
        yield DistributedContext(rank, size, device, no_timeout_group)
        dist.destroy_process_group()  # not after an error: it may wait for the rank that is gone
    finally:
        time.sleep(THREADS_REST_S)


def _keep_to_the_end(group: object) -> None:
    """Take a reference that is never given back, so that the process ends with the group still in memory.

    torch (2.6 at least) frees a gloo group while it holds the GIL and waits for the threads of the group, one of which
    may wait for the GIL to free the tensor of its last reduction: now and then a process would not end. Kept, such a
    thread may ask for the GIL of an interpreter that is ending, which aborts the process; before, on a machine with
    more to do than cores, it needs a moment in which this one sleeps: `THREADS_REST_S`.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


def launch_environment() -> tuple[int, int, int]:
    """Rank, number of processes and rank within this machine; 0, 1, 0 without a launcher.

    Raises:
        InputError: environment variables of a launch that are missing or no numbers.
    """
    size = _variable("WORLD_SIZE", 1)
    if size == 1:
        return 0, 1, _variable("LOCAL_RANK", 0)
    missing = [name for name in LAUNCH_VARIABLES if name not in os.environ]
    if missing:
        raise InputError(
            f"WORLD_SIZE={size} in the environment, but no {missing[0]}: start with torchrun or accelerate"
        )
    rank = _variable("RANK", 0)
    if rank >= size:
        raise InputError(f"RANK={rank} in the environment: expected less than WORLD_SIZE={size}")
    return rank, size, _variable("LOCAL_RANK", 0)


def ignored_launcher_settings() -> list[str]:
    """A line for each setting of the launcher that has no effect here."""
    lines = [
        f"{name}={os.environ[name]} in the environment (from accelerate) has no effect: {what}"
        for name, (default, what) in LAUNCHER_SETTINGS.items()
        if os.environ.get(name, default).lower() != default
    ]
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        lines.append(
            "accelerate was asked for several processes and has started this one alone, as it does without GPUs; "
            "--multi_gpu makes it start all of them"
        )
    return lines


def _variable(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise InputError(f"{name}={text!r} in the environment: expected a number")
    return int(text)


def _meet(rank: int, size: int, timeout_s: int) -> dist.Store:
    """A store at which all ranks have arrived. Keep it: rank 0 may host it."""
    host, port = os.environ["MASTER_ADDR"], _variable("MASTER_PORT", 0)
    torchrun_hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    deadline = time.monotonic() + timeout_s
    try:
        store: dist.Store = dist.TCPStore(
            host,
            port,
            is_master=rank == 0 and not torchrun_hosts,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
        )
    except RuntimeError as error:  # DistError, or in torch 2.6 no more than this
        expected = "a free MASTER_PORT" if rank == 0 and not torchrun_hosts else "rank 0 there"
        reason = str(error).splitlines()[0]
        raise TrainingError(
            f"launch: rank {rank} found {host}:{port} of no use within training.launch_timeout={timeout_s} s, "
            f"expected {expected}: {reason}"
        ) from error
    store = dist.PrefixStore(f"launch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    store.set(f"arrived/{rank}", "")
    missing = [other for other in range(size) if not _arrived(store, other, deadline)]
    if missing:
        raise TrainingError(
            f"launch: of {size} processes, rank {', '.join(map(str, missing))} did not arrive within "
            f"training.launch_timeout={timeout_s} s"
        )
    return store


def _arrived(store: dist.Store, rank: int, deadline: float) -> bool:
    try:
        store.wait([f"arrived/{rank}"], timedelta(seconds=max(0.01, deadline - time.monotonic())))
    except dist.DistStoreError:
        return False
    return True
