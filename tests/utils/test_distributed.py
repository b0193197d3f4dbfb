"""What the processes of a launch do together, on two of them."""

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.processes import free_port
from utils.distributed import DistributedContext, init_distributed
from utils.errors import InputError, TrainingError
from utils.files.lock import only_writer


def child(
    rank: int,
    port: int,
    restart_count: str,
    work: Callable[[DistributedContext], object],
    results: multiprocessing.Queue,
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RESTART_COUNT": restart_count}
    with init_distributed(launch_timeout=60, group_timeout=5) as ctx:
        try:
            result = work(ctx)
        except (InputError, SystemExit) as error:
            result = f"{type(error).__name__}: {error}"
        results.put((rank, result))
        ctx.barrier()


def on_two_ranks(
    work: Callable[[DistributedContext], object], port: int | None = None, restart_counts: tuple[str, str] = ("0", "0")
) -> list[object]:
    """What `work` gives on rank 0 and 1.

    Args:
        port: of a store that runs already.
    """
    context = multiprocessing.get_context("fork")
    results, port = context.Queue(), port or free_port()
    processes = [
        context.Process(target=child, args=(rank, port, restart_counts[rank], work, results)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    of_ranks = dict(results.get(timeout=90) for _ in processes)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return [of_ranks[0], of_ranks[1]]


def fail_on(rank: int, ctx: DistributedContext) -> str:
    if ctx.rank == rank:
        raise InputError(f"bad file on {rank}")
    return "fine"


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with (
            pytest.raises(TrainingError, match=rf"127\.0\.0\.1:{port} .*expected a free MASTER_PORT"),
            init_distributed(2),
        ):
            pass


@pytest.mark.multiprocess
def test_reductions_leave_their_argument_as_it_is() -> None:
    def work(ctx: DistributedContext) -> list[list[float]]:
        values = torch.tensor([1.0 + ctx.rank, -float(ctx.rank)])
        return [ctx.all_reduce_sum(values).tolist(), ctx.all_reduce_max(values).tolist(), values.tolist()]

    assert on_two_ranks(work) == [[[3, -1], [2, 0], [1, 0]], [[3, -1], [2, 0], [2, -1]]]


@pytest.mark.multiprocess
def test_an_error_is_raised_where_it_happened_and_ends_all_ranks() -> None:
    assert on_two_ranks(lambda ctx: ctx.broadcast_from_rank0(lambda: fail_on(0, ctx))) == [
        "InputError: bad file on 0",
        "SystemExit: 1",
    ]
    for rank in range(2):
        expected = ["SystemExit: 1", "SystemExit: 1"]
        expected[rank] = f"InputError: bad file on {rank}"
        assert on_two_ranks(lambda ctx, rank=rank: ctx.rank0_first(lambda: fail_on(rank, ctx))) == expected


@pytest.mark.multiprocess
def test_rank_0_goes_first_and_may_take_longer_than_the_limit_of_a_reduction() -> None:
    def work(ctx: DistributedContext) -> float:
        def make() -> float:
            time.sleep(6 if ctx.is_rank0 else 0)
            return time.monotonic()

        return ctx.rank0_first(make)

    first, second = on_two_ranks(work)
    assert first <= second


@pytest.mark.multiprocess
def test_differences_are_named_by_rank_0() -> None:
    ours, theirs = on_two_ranks(lambda ctx: ctx.assert_same_on_all_ranks("config", {"same": 1, "seed": ctx.rank}))
    assert ours == "InputError: launch: rank 1 differs from rank 0 in config: seed: found 1, expected 0"
    assert theirs == "SystemExit: 1"


@pytest.mark.multiprocess
def test_restarted_ranks_meet_in_the_store_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """It still holds the entries of their last start; the agents have counted a different number of restarts."""
    agent = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")

    def work(ctx: DistributedContext) -> float:
        return ctx.all_reduce_sum(torch.tensor(1.0 + ctx.rank)).item()

    for counts in (("0", "0"), ("0", "1"), ("2", "1")):
        assert on_two_ranks(work, port=agent.port, restart_counts=counts) == [3, 3]


@pytest.mark.multiprocess
def test_rank_0_holds_the_lock_for_all(tmp_path: Path) -> None:
    def work(ctx: DistributedContext) -> bool:
        with ctx.locked(tmp_path / "x"):
            held = (tmp_path / "x.lock").exists()
            ctx.barrier()
        return held

    assert on_two_ranks(work) == [True, True]
    assert list(tmp_path.iterdir()) == []
    with only_writer(tmp_path / "x"):
        refused, left = on_two_ranks(work)
    assert str(tmp_path / "x") in refused
    assert left == "SystemExit: 1"
