"""Each warning fires on its cause, at most once an hour, and is silent otherwise."""

import math
import random
from collections import namedtuple
from pathlib import Path

import pytest

from utils.config import load_config
from utils.run import alerts
from utils.run.alerts import ENOUGH, Alerts


class Told:
    """Alerts whose clock stands until it is moved."""

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.texts: list[str] = []
        self.now = 0.0
        self.alerts = Alerts(self._tell, lambda: self.now)

    def _tell(self, kind: str, text: str) -> None:
        self.kinds.append(kind)
        self.texts.append(text)

    def usual(self, lines: int = ENOUGH) -> None:
        """Lines as of a run that learns."""
        draws = random.Random(0)
        for line in range(lines):
            self.line(
                **{
                    "train/loss": 7 - line / lines + draws.gauss(0, 0.02),
                    "train/grad_norm_max": math.exp(draws.gauss(0, 0.3)),
                    "perf/images_per_s": draws.gauss(100, 8),
                    "perf/data_wait_pct": draws.uniform(0, 9),
                }
            )

    def line(self, **metrics: float) -> None:
        self.alerts.examine(metrics)


def test_silent_on_a_usual_run() -> None:
    told = Told()
    told.usual(lines=1000)
    assert told.kinds == []


@pytest.mark.parametrize("name", ["train/loss", "train/grad_norm_max"])
def test_a_spike(name: str) -> None:
    told = Told()
    told.line(**{name: 100.0})  # too early to tell
    told = Told()
    told.usual()
    told.line(**{name: 20.0})
    assert told.kinds == [f"spike of {name}"]
    assert "is 20, the last 32 lines of the log have" in told.texts[0]


def test_a_warning_of_a_kind_comes_once_an_hour() -> None:
    told = Told()
    for minutes in (0, 59, 60, 61, 121):
        told.now = 60.0 * minutes
        told.alerts.warn("disk", str(minutes))
        told.alerts.warn("other", str(minutes))
    assert told.texts == ["0", "0", "60", "60", "121", "121"]


def test_slow_and_hungry_for_three_lines() -> None:
    told = Told()
    told.usual()
    slow, hungry = {"perf/images_per_s": 60.0}, {"perf/data_wait_pct": 40.0}
    for metrics in (slow, slow, {"perf/images_per_s": 90.0}, slow, slow, hungry, hungry):
        told.line(**metrics)
    assert told.kinds == []
    told.line(**slow)
    told.line(**slow)
    told.line(**slow)
    for _ in range(3):
        told.line(**hungry)
    assert told.kinds == ["throughput", "data wait"]
    assert told.texts[0].startswith("60 images/s, the median is ")
    assert told.texts[1].startswith("40 % of the time")


def test_allocations_that_are_tried_again() -> None:
    told = Told()
    told.line(**{"perf/alloc_retries": 1})
    assert told.kinds == ["memory"]


def test_a_disk_without_room_for_two_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(alerts.shutil, "disk_usage", lambda folder: usage(3e9))
    told = Told()
    told.alerts.check_disk(tmp_path, 1.5e9)
    assert told.kinds == []
    told.alerts.check_disk(tmp_path, 1.6e9)
    assert told.texts == [f"3 GB free in {tmp_path}, a checkpoint needs 1.6"]


def test_schedules_that_do_not_end() -> None:
    told = Told()
    config = load_config(["experiment.output_dir=x", "training.max_train_steps=100"])
    told.alerts.check_schedules(config)
    assert told.kinds == ["schedule"]
    assert "warmup_steps=62500" in told.texts[0]
    assert "randomness_anneal_end=187500" in told.texts[0]
