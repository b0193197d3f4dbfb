"""Means of the steps between two log lines, and where their time went."""

import time
from contextlib import suppress

import pytest
import torch

from tests.processes import run_ranks
from utils.distributed import DistributedContext, init_distributed
from utils.run.estimates import peak_flops
from utils.run.metrics import IntervalMeans, TrainingMetrics

ALONE = DistributedContext(0, 1, torch.device("cpu"))


def metrics_of(step: int, rank: int = 0) -> list[dict]:
    """Two micro-batches whose values all differ."""
    draws = torch.Generator().manual_seed(10 * step + rank)
    losses, sums = torch.rand(2, generator=draws), torch.rand(2, generator=draws)
    counts = torch.randint(1, 9, (2,), generator=draws).float()
    return [{"loss": losses[i], "cos": (sums[i], counts[i])} for i in range(2)]


def check_means(means: dict[str, float], steps: range, ranks: int) -> None:
    batches = [batch for step in steps for rank in range(ranks) for batch in metrics_of(step, rank)]
    assert means["loss"] == pytest.approx(sum(float(b["loss"]) for b in batches) / len(batches), abs=1e-6)
    totals = [sum(float(batch["cos"][i]) for batch in batches) for i in range(2)]
    assert means["cos"] == pytest.approx(totals[0] / totals[1], abs=1e-6)
    assert means["train/grad_norm"] == pytest.approx(sum(steps) / len(steps))
    assert means["train/grad_norm_max"] == max(steps)


def test_means_of_every_interval() -> None:
    interval = IntervalMeans(ALONE)
    for steps in (range(0, 1), range(1, 7), range(7, 14)):
        for step in steps:
            interval.add(metrics_of(step), torch.tensor(float(step)))
        check_means(interval.reduce([])[0], steps, ranks=1)


def two_ranks() -> None:
    with init_distributed(30, 30) as ctx:
        interval = IntervalMeans(ctx)
        for step in range(5):
            interval.add(metrics_of(step, ctx.rank), torch.tensor(float(step)))
        means, of_ranks = interval.reduce([ctx.rank, 7.5])
        check_means(means, range(5), ranks=2)
        assert of_ranks == [[0, 7.5], [1, 7.5]]


@pytest.mark.multiprocess
def test_means_over_ranks() -> None:
    run_ranks(two_ranks, processes=2)


def test_an_interval_without_a_finite_step_has_no_mean() -> None:
    interval = IntervalMeans(ALONE)
    assert interval.reduce([]) == ({}, [[]])
    interval.add(metrics_of(1), torch.tensor(1.0))
    interval.reduce([])
    means = interval.reduce([])[0]
    assert set(means) == {"loss", "cos", "train/grad_norm", "train/grad_norm_max"}
    assert all(value != value for value in means.values())


class Clockwork:
    """In place of `time`: passes only where a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


class Batches:
    """Takes `seconds` for a batch, and has left out two images."""

    num_skipped = 2

    def __init__(self, clock: Clockwork, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def __next__(self) -> str:
        self.clock.pass_by(self.seconds)
        return "batch"


def do_steps(metrics: TrainingMetrics, clock: Clockwork, count: int) -> None:
    """Steps of 2 s, of which 0.5 s is waiting for data."""
    for _ in range(count):
        assert metrics.next_batch(Batches(clock, 0.5)) == "batch"
        clock.pass_by(1.5)
        metrics.end_step()


def test_the_time_of_steps_pauses_and_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow grid and a slow save are pauses, slow data are waiting, and neither makes a step longer."""
    clock = Clockwork(monkeypatch)
    metrics = TrainingMetrics(ALONE, global_batch_size=64, trained_s=1000, flops_per_image=1e9)
    metrics.start()
    clock.pass_by(50)  # the first step compiles
    metrics.end_step()
    assert metrics.log_line() == {"train/skipped_images": 0, "perf/pause_s": 0.0}
    with metrics.pause():
        clock.pass_by(3)
        with metrics.pause():
            clock.pass_by(4)
    for _ in range(4):
        do_steps(metrics, clock, 1)
        with metrics.pause():
            clock.pass_by(10)
    assert metrics.log_line() == {
        "train/skipped_images": 2,
        "perf/pause_s": 47.0,
        "perf/images_per_s": 32.0,
        "perf/images_per_s_per_gpu": 32.0,
        "perf/step_ms": 2000.0,
        "perf/data_wait_pct": 25.0,
    }
    assert metrics.log_line() == {"train/skipped_images": 2, "perf/pause_s": 0.0}  # no step since
    assert metrics.trained_s == 1000 + 50 + 7 + 4 * 12
    assert metrics.seconds_per_step == (7 + 4 * 12) / 4


def test_an_error_in_a_pause_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clockwork(monkeypatch)
    metrics = TrainingMetrics(ALONE, global_batch_size=64)
    with suppress(ZeroDivisionError), metrics.pause(), metrics.pause():
        clock.pass_by(1)
        raise ZeroDivisionError
    with metrics.pause():
        clock.pass_by(2)
    assert metrics.log_line()["perf/pause_s"] == 3.0


def slowest_rank_counts() -> None:
    with init_distributed(30, 30) as ctx, pytest.MonkeyPatch.context() as monkeypatch:
        clock = Clockwork(monkeypatch)
        metrics = TrainingMetrics(ctx, global_batch_size=64)
        metrics.end_step()
        metrics.next_batch(Batches(clock, 1.0 + ctx.rank))
        clock.pass_by(3.0 - ctx.rank)
        metrics.end_step()
        line = metrics.log_line()
        assert (line["perf/data_wait_pct"], line["perf/images_per_s"], line["perf/images_per_s_per_gpu"]) == (50, 16, 8)
        assert line["train/skipped_images"] == metrics.skipped_images() == 4


@pytest.mark.multiprocess
def test_waiting_is_that_of_the_slowest_rank() -> None:
    run_ranks(slowest_rank_counts, processes=2)


def test_memory_and_utilization_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = TrainingMetrics(ALONE, global_batch_size=64, flops_per_image=1e12)
    metrics.on_gpu = True
    metrics.peak_flops = peak_flops("NVIDIA H100 80GB HBM3")
    statistics = {"num_alloc_retries": 3, "active_bytes.all.peak": 2**31}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: statistics)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    do_steps(metrics, Clockwork(monkeypatch), 3)
    line = metrics.log_line()
    assert (line["perf/memory_gib"], line["perf/alloc_retries"]) == (2.0, 3)
    assert line["perf/mfu_pct"] == pytest.approx(100 * 32e12 / 989e12)
    assert metrics.log_line()["perf/alloc_retries"] == 0  # counted once


def test_peaks_are_known_by_name() -> None:
    assert peak_flops("NVIDIA A800-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    for unknown in ("GeForce of the year 2030", "NVIDIA RTX A4000", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"):
        assert peak_flops(unknown) is None


def test_skipped_images_are_counted_on_after_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = TrainingMetrics(ALONE, global_batch_size=8, skipped_images=5)
    metrics.next_batch(Batches(Clockwork(monkeypatch), 0))
    assert metrics.skipped_images() == 7
    assert metrics.log_line()["train/skipped_images"] == 7
