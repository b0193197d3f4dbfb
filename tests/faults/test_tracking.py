"""Row 25 of the fault matrix: whatever wandb does, training is unaffected and the local metrics are complete."""

import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest

from scripts import train_rear
from tests.faults.runs import CURVES, Run
from utils.config import load_config
from utils.run.tracking import Tracker, read_metrics

ROOT = Path(__file__).parents[2]


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
    wandb.Settings = lambda **options: types.SimpleNamespace(**options)
    wandb.setup = lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode="online"))
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


@pytest.mark.parametrize(
    ("mode", "source", "folders"),
    [
        ("offline", "environment", ["offline-run"]),
        ("dryrun", "environment", ["offline-run"]),
        ("disabled", "environment", []),
        ("disabled", "settings", []),
        ("online", "environment", ["offline-run"]),
    ],
)
def test_the_real_wandb_runs_in_the_mode_that_was_asked_for(
    fault_arguments: list[str], tmp_path: Path, mode: str, source: str, folders: list[str]
) -> None:
    """In a process of its own: wandb keeps what it has read of the environment."""
    run = tmp_path / "run"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "WANDB_API_KEY": ""}
    if source == "environment":
        environment["WANDB_MODE"] = mode
    else:
        (tmp_path / "wandb").mkdir()
        (tmp_path / "wandb/settings").write_text(f"[default]\nmode = {mode}\n")
    config = [*fault_arguments, f"experiment.output_dir={run}", "training.enable_wandb=true"]
    script = (
        "import sys; from pathlib import Path; from utils.config import load_config\n"
        "from utils.run.tracking import Tracker\n"
        "config = load_config(sys.argv[1:]); folder = Path(config.experiment.output_dir); folder.mkdir()\n"
        "tracker = Tracker(config, folder, 0); tracker.log({'train/loss': 1.0}, 1); tracker.finish()"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, *config], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    found = [path.name.rsplit("-", 2)[0] for path in run.glob("wandb/*run-*")]
    assert found == folders
    assert ("wandb is offline for this run (no API key" in result.stderr) == (mode == "online")
    assert len(read_metrics(run / "metrics.jsonl")) == 1
