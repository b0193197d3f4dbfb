"""Row 25 of the fault matrix: wandb's errors do not affect training and the local metrics are complete."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import wandb

from scripts import train_rear
from tests.faults.runs import CURVES, Run
from tests.faults.wandb_server import WandbServer, read_log
from tests.processes import WAIT_S
from utils.config import load_config
from utils.run.metrics_file import read_metrics
from utils.run.status import EXIT_PREEMPTED
from utils.run.tracking import WandbRun

ROOT = Path(__file__).parents[2]
WANDB_ON = ["training.enable_wandb=true", "experiment.group=study", "experiment.tags=[one,two]"]


class FakeRun:
    """A wandb run that fails where a test asks for it."""

    offline, disabled, url = False, False, "https://wandb.invalid"

    def __init__(self, fails: str | None) -> None:
        self.fails, self.step = fails, 0

    def __getattr__(self, name: str) -> Any:
        signature = inspect.signature(getattr(wandb.Run, name))

        def call(*arguments: object, **named: object) -> None:
            signature.bind(self, *arguments, **named)
            assert "step" not in named, "steps that are run again would be dropped"
            if self.fails == name == "log":
                self.step += 1
            if self.fails == name and (name != "log" or self.step >= 3):
                raise ConnectionError("server gone")

        return call


def fake_wandb(fails: str | None) -> types.ModuleType:
    fake = types.ModuleType("wandb")
    fake.errors, fake.Settings, fake.Image = wandb.errors, wandb.Settings, wandb.Image
    fake.setup = lambda settings: types.SimpleNamespace(settings=settings)
    fake.login = lambda prompt: fails != "key"

    def init(**arguments: object) -> FakeRun:
        inspect.signature(wandb.init).bind(**arguments)
        if fails == "network" and arguments.get("mode") != "offline":
            raise TimeoutError("no answer in 30 s\nlong trace")
        if fails == "everything":
            raise OSError("cannot write")
        return FakeRun(fails)

    fake.init = init
    return fake


@pytest.mark.parametrize("fails", ["absent", "key", "network", "everything", "log", "finish"])
def test_row_25(
    fault_arguments: list[str], oracle: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None if fails == "absent" else fake_wandb(fails))
    config = load_config([*fault_arguments, f"experiment.output_dir={tmp_path / 'run'}", *WANDB_ON])
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


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Without the user's wandb."""
    others = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return {**others, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "WANDB_API_KEY": ""}


SCRIPT = """
import sys
from pathlib import Path
from utils.config import load_config
from utils.run import tracking

tracking.FINISH_TIMEOUT_S = 2
config = load_config(sys.argv[1:])
folder = Path(config.experiment.output_dir)
folder.mkdir()
run = tracking.WandbRun(config, folder)
run.start(0, {})
print(run.url, run.sync_command)
run.log({"train/loss": 1.0}, 1)
run.alert("title", "text")
run.finish(0)
"""


def in_a_process(arguments: list[str], environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Of its own: wandb keeps what it has read of the environment."""
    command = [sys.executable, "-c", SCRIPT, *arguments, f"experiment.output_dir={folder}", *WANDB_ON]
    result = subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True, timeout=WAIT_S)
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.parametrize(
    ("mode", "source", "folders"),
    [
        ("offline", "environment", ["offline-run"]),
        ("disabled", "settings", []),
        ("online", "environment", ["offline-run"]),  # without a key
    ],
)
def test_the_real_wandb_runs_in_the_mode_that_was_asked_for(
    fault_arguments: list[str], environment: dict[str, str], tmp_path: Path, mode: str, source: str, folders: list[str]
) -> None:
    if source == "environment":
        environment["WANDB_MODE"] = mode
    else:
        (tmp_path / "wandb").mkdir()
        (tmp_path / "wandb/settings").write_text(f"[default]\nmode = {mode}\n")
    run = tmp_path / "run"
    result = in_a_process(fault_arguments, environment, run)
    assert [path.name.rsplit("-", 2)[0] for path in run.glob("wandb/*run-*")] == folders
    assert [path.name for path in run.iterdir()] == [] or folders
    assert ("wandb is offline for this run (no API key" in result.stderr) == (mode == "online")
    assert ("wandb sync" in result.stdout) == bool(folders)


def test_an_upload_that_hangs_ends_in_time(
    fault_arguments: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    with WandbServer(hangs=True) as server:
        result = in_a_process(fault_arguments, environment | server.environment, tmp_path / "run")
    assert result.stdout.startswith(f"{server.environment['WANDB_BASE_URL']}/me/rear/runs/")
    assert "wandb did not finish" in result.stderr


class Segment:
    """What wandb wrote of one start."""

    def __init__(self, path: Path) -> None:
        self.by_kind: dict[str, list[Any]] = {}
        for record in read_log(path):
            kind = record.WhichOneof("record_type")
            self.by_kind.setdefault(kind, []).append(getattr(record, kind))
        items = [{item.nested_key[0]: item.value_json for item in row.item} for row in self.by_kind.get("history", [])]
        self.losses = [(int(row["train/step"]), json.loads(row["train/loss"])) for row in items if "train/loss" in row]

    def exit_code(self) -> int:
        (record,) = self.by_kind["exit"]
        return record.exit_code


def segments(run: Run) -> list[Segment]:
    return [Segment(path) for path in sorted(run.folder.glob("wandb/offline-run-*/*.wandb"))]


def history(run: Run) -> list[tuple[int, float]]:
    return [(int(row["step"]), row["train/loss"]) for row in read_metrics(run.folder / "metrics.jsonl")]


def test_a_resumed_run_continues_in_wandb_and_can_be_uploaded(
    run: Run, environment: dict[str, str], tmp_path: Path
) -> None:
    """After a kill while checkpoint 8 is written, which also cuts off the log that wandb writes."""
    run.arguments += WANDB_ON
    offline = {key: environment[key] for key in ("HOME", "WANDB_API_KEY")} | {"WANDB_MODE": "offline"}
    assert run(REAR_FAULT="save.begin.8", **offline) == [-signal.SIGKILL]
    time.sleep(1)  # wandb names the folder of a start by the second
    run_id = (run.folder / "wandb_run_id").read_text().strip()
    run.completed(**offline)
    killed, resumed = segments(run)
    assert "wandb is" not in run.output()  # no warning

    assert resumed.losses == [(step, loss) for step, loss in history(run) if step > 4]
    (start,) = resumed.by_kind["run"]
    assert (start.run_id, start.resume, start.run_group, [*start.tags]) == (run_id, True, "study", ["one", "two"])
    config = {item.key: json.loads(item.value_json) for item in start.config.update}
    assert config["training"]["max_train_steps"] == 12
    assert config["run"]["processes"] == 1
    assert ("*", "train/step") in [(metric.glob_name, metric.step_metric) for metric in resumed.by_kind["metric"]]
    assert resumed.exit_code() == 0

    (command,) = {line.split("to upload: ")[1] for line in run.log().splitlines() if "wandb sync" in line}
    with WandbServer() as server:
        path = f"{Path(sys.executable).parent}:{environment['PATH']}"
        done = subprocess.run(["bash", "-c", command], env=environment | server.environment | {"PATH": path})
    assert done.returncode == 0
    uploaded = [(row["train/step"], row["train/loss"]) for row in server.history if "train/loss" in row]
    assert uploaded == killed.losses + resumed.losses
    assert server.exit_codes[-1:] == [0]


@pytest.mark.parametrize("ends", ["preempted", "failed"])
def test_wandb_records_how_a_run_ended(run: Run, environment: dict[str, str], ends: str) -> None:
    run.arguments += WANDB_ON
    offline = {key: environment[key] for key in ("HOME", "WANDB_API_KEY")} | {"WANDB_MODE": "offline"}
    if ends == "failed":
        assert run(REAR_FAULT="step.2:raise", **offline) == [1]
    else:
        run.start(TEST_HOLD="2", **offline)
        run.wait_for_step(2)
        os.kill(run.processes[0].pid, signal.SIGTERM)
        assert run.wait() == [EXIT_PREEMPTED]
    (segment,) = segments(run)
    assert [step for step, _ in segment.losses][:2] == [1, 2]
    assert segment.exit_code() == (1 if ends == "failed" else EXIT_PREEMPTED)
    assert ("preempting" in segment.by_kind) == (ends == "preempted")


def test_a_start_from_the_beginning_is_a_new_run(
    fault_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(None))
    config = load_config([*fault_arguments, f"experiment.output_dir={tmp_path}", *WANDB_ON])
    ids = []
    for first_step in (0, 2, 0):
        WandbRun(config, tmp_path).start(first_step, {})
        ids.append((tmp_path / "wandb_run_id").read_text().strip())
    assert ids[0] == ids[1] != ids[2]
    (tmp_path / "wandb_run_id").write_text("abcd1234\nsent_until 4\n")  # as earlier versions wrote it
    WandbRun(config, tmp_path).start(2, {})
    assert (tmp_path / "wandb_run_id").read_text() == "abcd1234\n"
