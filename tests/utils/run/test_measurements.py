"""Means of the steps between two lines of the log, and where their time went."""

import time

import pytest
import torch

from tests.processes import run_ranks
from utils.distributed import DistributedContext, init_distributed
from utils.run.clock import StepClock, Times
from utils.run.interval import IntervalMeans, Ratio
from utils.run.measurements import Measurements
from utils.run.performance import Performance, peak_flops

ALONE = DistributedContext(0, 1, torch.device("cpu"))


def metrics_of(step: int, rank: int = 0) -> list[dict]:
    """Two micro-batches whose values all differ."""
    draws = torch.Generator().manual_seed(10 * step + rank)
    losses, sums = torch.rand(2, generator=draws), torch.rand(2, generator=draws)
    counts = torch.randint(1, 9, (2,), generator=draws).float()
    return [{"loss": losses[i], "cos": Ratio(sums[i], counts[i])} for i in range(2)]


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
        check_means(interval.take([])[0], steps, ranks=1)


def two_ranks() -> None:
    with init_distributed(30, 30) as ctx:
        interval = IntervalMeans(ctx)
        for step in range(5):
            interval.add(metrics_of(step, ctx.rank), torch.tensor(float(step)))
        means, of_ranks = interval.take([ctx.rank, 7.5])
        check_means(means, range(5), ranks=2)
        assert of_ranks == [[0, 7.5], [1, 7.5]]


@pytest.mark.multiprocess
def test_means_over_ranks() -> None:
    run_ranks(two_ranks, processes=2)


def test_an_interval_without_a_finite_step_has_no_mean() -> None:
    interval = IntervalMeans(ALONE)
    assert interval.take([]) == ({}, [[]])
    interval.add(metrics_of(1), torch.tensor(1.0))
    interval.take([])
    means = interval.take([])[0]
    assert set(means) == {"loss", "cos", "train/grad_norm", "train/grad_norm_max"}
    assert all(value != value for value in means.values())


class Clockwork:
    """In place of `time`: passes only where a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


def test_the_time_of_steps_pauses_and_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow grid and a slow save are pauses, slow data are waiting, and neither makes a step longer."""
    time_of = Clockwork(monkeypatch)
    clock = StepClock(trained_s=1000)
    clock.start()
    time_of.pass_by(50)  # the first step
    clock.step_done()
    with clock.pause():
        time_of.pass_by(3)
        with clock.pause():  # within another one
            time_of.pass_by(4)
    for _ in range(4):
        with clock.waiting():
            time_of.pass_by(0.5)
        time_of.pass_by(1.5)
        clock.step_done()
        with clock.pause():
            time_of.pass_by(10)
    assert clock.take() == Times(steps=4, in_steps=8.0, waiting=2.0, pauses=47.0)
    assert clock.take() == Times()
    assert clock.trained_s == 1000 + 50 + 7 + 4 * 12
    assert clock.seconds_per_step == (7 + 4 * 12) / 4


def test_speed_and_waiting_of_the_slowest_rank() -> None:
    performance = Performance(DistributedContext(0, 2, torch.device("cpu")), global_batch_size=64, flops_per_image=1e9)
    metrics = performance.metrics(Times(steps=4, in_steps=8.0, waiting=1.0, pauses=3.0), [[1.0, 0, 0], [2.0, 0, 0]])
    assert metrics == {
        "perf/pause_s": 3.0,
        "perf/images_per_s": 32.0,
        "perf/images_per_s_per_gpu": 16.0,
        "perf/step_ms": 2000.0,
        "perf/data_wait_pct": 25.0,
    }
    assert performance.metrics(Times(pauses=3.0), [[0, 0, 0]]) == {"perf/pause_s": 3.0}  # after the first step


def test_memory_and_utilization_of_a_gpu() -> None:
    performance = Performance(ALONE, global_batch_size=64, flops_per_image=1e12)
    performance.on_gpu, performance.peak = True, peak_flops("NVIDIA H100 80GB HBM3")
    metrics = performance.metrics(Times(steps=1, in_steps=1.0), [[0.0, 2.0**30, 0], [0.0, 2.0**31, 3]])
    assert metrics["perf/memory_gib"] == 2.0
    assert metrics["perf/alloc_retries"] == 3
    assert metrics["perf/mfu_pct"] == pytest.approx(100 * 64e12 / 989e12)


def test_peaks_are_known_by_name() -> None:
    assert peak_flops("NVIDIA A800-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    for unknown in ("GeForce of the year 2030", "NVIDIA RTX A4000", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"):
        assert peak_flops(unknown) is None


def test_skipped_images_are_counted_on_after_a_resume() -> None:
    measured = Measurements(ALONE, 8, skipped_images=5, trained_s=0.0, flops_per_image=None)
    batches = type("Batches", (), {"num_skipped": 2, "__next__": lambda self: "batch"})()
    assert measured.next_batch(batches) == "batch"
    assert measured.count_skipped() == 7
    assert measured.take()["train/skipped_images"] == 7
