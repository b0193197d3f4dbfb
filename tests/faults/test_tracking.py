"""Row 25 of the fault matrix: whatever wandb does, training is unaffected and the local metrics are complete."""

import sys
import types
import warnings
from pathlib import Path

import pytest

from scripts import train_rear
from tests.faults.runs import CURVES, Run
from utils.config import load_config
from utils.run.tracking import Tracker, read_metrics


class FakeRun:
    """Records what is logged; fails where it is told to."""

    def __init__(self, wandb: types.ModuleType, arguments: dict) -> None:
        self.wandb, self.arguments, self.logged = wandb, arguments, []

    def log(self, values: dict, step: int) -> None:
        if self.wandb.fails == "log" and step >= 3:
            raise ConnectionError("server gone")
        self.logged.append(step)

    def finish(self) -> None:
        if self.wandb.fails == "finish":
            raise TimeoutError("upload timed out")


def fake_wandb(fails: str | None) -> types.ModuleType:
    wandb = types.ModuleType("wandb")
    wandb.fails, wandb.runs = fails, []
    wandb.errors = types.SimpleNamespace(UsageError=RuntimeError)
    wandb.Settings = lambda **options: types.SimpleNamespace(mode="online", **options)
    wandb.login = lambda **options: fails != "key"
    wandb.Image = lambda image: image

    def init(**arguments: object) -> FakeRun:
        if fails == "network" and arguments.get("mode") != "offline":
            raise TimeoutError("no answer in 30 s\nlong trace")
        if fails == "everything":
            raise OSError("cannot write")
        wandb.runs.append(FakeRun(wandb, arguments))
        return wandb.runs[-1]

    wandb.init = init
    return wandb


@pytest.mark.parametrize("fails", ["absent", "key", "network", "log", "finish", "everything"])
def test_row_25(
    fault_arguments: list[str], oracle: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None if fails == "absent" else fake_wandb(fails))
    config = load_config([*fault_arguments, f"experiment.output_dir={tmp_path / 'run'}", "training.enable_wandb=true"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert train_rear.main(config) == "completed"
    about_wandb = [str(warning.message) for warning in caught if "wandb" in str(warning.message)]
    assert len(about_wandb) == 1, about_wandb
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    expected = read_metrics(oracle.folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert [row[name] for name in CURVES] == pytest.approx([other[name] for name in CURVES], abs=1e-6)


def test_row_25_without_a_fault_there_is_no_warning_and_the_id_is_kept(
    fault_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command again is the same wandb run, and steps that are run again replace their metrics."""
    wandb = fake_wandb(None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = load_config([*fault_arguments, f"experiment.output_dir={tmp_path / 'run'}", "training.enable_wandb=true"])
    config.training.stop_steps = 5
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train_rear.main(config)
        config.training.stop_steps = None
        train_rear.main(config)
    assert wandb.runs[0].arguments["id"] == wandb.runs[1].arguments["id"]
    assert [sorted(set(run.logged)) for run in wandb.runs] == [[*range(1, 6)], [*range(6, 13)]]


def test_metrics_of_a_killed_run_are_cut_at_the_checkpoint(
    fault_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config([*fault_arguments, f"experiment.output_dir={tmp_path}"])
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n{"step": 4}\n{"step": 5}\n{"step": 6, "tr')
    Tracker(config, tmp_path, first_step=4)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [3, 4]
