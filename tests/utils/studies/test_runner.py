"""Cells side by side: order, threads, kills, stops, failures, several commands; with stub stages."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from scripts.study import main
from tests.processes import WAIT_S
from tests.utils.studies.stub_study import StubStudy
from utils.errors import InputError
from utils.studies import runner
from utils.studies.cells import Cell, State
from utils.studies.runner import remaining_s

STAGES = ("train", "sample", "evaluate")
ALL = [f"{arm}.{seed}.{stage}" for seed in (1, 2) for arm in ("ar", "rear") for stage in STAGES]


@pytest.fixture
def study(tiny_config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StubStudy:
    study = StubStudy(tiny_config_file, tmp_path)
    monkeypatch.setattr(Cell, "command", lambda cell, stage: study.command(cell, stage))
    monkeypatch.setattr(runner, "POLL_S", 0.01)
    return study


def wait_until(is_so: object, what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def results(study: StubStudy) -> list[dict]:
    rows = [json.loads(line) for line in (study.folder / "results.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def state(study: StubStudy, name: str) -> dict:
    return json.loads((study.folder / name / "cell.json").read_text())


def test_one_worker_runs_all_stages_in_order(study: StubStudy) -> None:
    assert main(study.words("workers=1")) == 0
    assert study.calls() == ALL
    assert all(" threads=1 " in line for line in (study.control / "calls").read_text().splitlines())
    rows = results(study)
    assert [(row["arm"], row["seed"], row["planned"]) for row in rows] == [
        ("ar", 1, True),
        ("ar", 2, True),
        ("rear", 1, True),
        ("rear", 2, True),
    ]
    assert rows[3]["metrics"] == {"frechet_distance": 56, "val/ar_loss": 4.2}
    assert len({row["config_sha256"] for row in rows}) == 2
    assert len({row["plan_sha256"] for row in rows}) == 1
    assert rows[0]["weights"] == {"code": "stub"}
    assert sorted(path.name for path in study.folder.iterdir()) == [
        "ar",
        "figure.png",
        "plan.json",
        "rear",
        "results.jsonl",
        "table.md",
    ]


def test_workers_do_not_change_the_results(study: StubStudy, tmp_path: Path) -> None:
    assert main(study.words("workers=1")) == 0
    assert main(study.words("workers=3", f"output_dir={tmp_path / 'other'}")) == 0
    one = results(study)
    study.folder = tmp_path / "other"
    assert results(study) == one
    assert sorted(study.calls()[len(ALL) :]) == sorted(ALL)


def test_a_complete_study_runs_nothing(study: StubStudy, capsys: pytest.CaptureFixture) -> None:
    assert main(study.words("workers=2")) == 0
    before = (study.folder / "results.jsonl").read_text()
    assert main(study.words("workers=2")) == 0
    assert len(study.calls()) == len(ALL)
    assert (study.folder / "results.jsonl").read_text() == before
    assert "no verdict can be 'real'; use at least 6 seeds" in capsys.readouterr().out


def test_a_failed_cell_is_reported_and_tried_again(study: StubStudy, capsys: pytest.CaptureFixture) -> None:
    (study.control / "fail.ar.1.sample").write_text("error: the disk is full")
    assert main(study.words("workers=2")) == 1
    assert sorted(study.calls()) == sorted(set(ALL) - {"ar.1.evaluate"})  # the others continue
    output = capsys.readouterr()
    assert "ar/seed1 failed: sample: the disk is full; see " in output.out
    assert "not complete: ar/seed1 (failed); rerun" in output.out
    assert not (study.folder / "results.jsonl").exists()
    assert state(study, "ar/seed1")["error"].startswith("sample: the disk is full")
    assert main([*study.words(), "--status"]) == 0
    assert "| ar/seed1 | failed | sample |" in capsys.readouterr().out
    assert main(["report", *study.words()]) == 0
    table = capsys.readouterr().out
    assert "3 of 4 cells are complete" in table
    assert "no verdict yet: 1 of 2 pairs are complete" in table
    (study.control / "fail.ar.1.sample").unlink()
    assert main(study.words("workers=2")) == 0
    assert study.calls()[len(ALL) - 1 :] == ["ar.1.sample", "ar.1.evaluate"]
    assert len(results(study)) == 4


def test_a_cell_without_the_primary_metric_fails(study: StubStudy, capsys: pytest.CaptureFixture) -> None:
    study.plan |= {"metric": "val/fid_10", "overrides": {"experiment.eval_every": 1}}
    assert main(study.words("workers=4")) == 1
    assert "found no finite metric val/fid_10, only frechet_distance, val/ar_loss" in capsys.readouterr().out


def test_a_killed_study_continues_without_repeating_stages(study: StubStudy) -> None:
    """Its stages die with it: nothing writes to the folder of a cell any more."""
    (study.control / "hang.rear.1.sample").touch()
    process = study.start("workers=1")
    wait_until(lambda: "rear.1.sample" in study.calls(), "the stage does not start")
    pid = int((study.control / "calls").read_text().splitlines()[-1].split("pid=")[1].split()[0])
    process.kill()
    process.join()
    try:
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the stage outlives the study")
    finally:
        (study.control / "hang.rear.1.sample").unlink()
    done = study.calls()
    assert main(study.words("workers=1")) == 0
    assert done == ALL[: len(done)]
    assert study.calls() == done + ALL[len(done) - 1 :]  # the stage in progress starts again
    assert len(results(study)) == 4


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_stop_signal_ends_the_stages(study: StubStudy, name: str) -> None:
    """Training, which saves and says so by its exit status, and sampling, which does not."""
    hanging = ["ar.1.train", "rear.1.sample"]
    for stage in hanging:
        (study.control / f"hang.{stage}").touch()
    process = study.start("workers=2")
    wait_until(lambda: {*hanging} <= {*study.calls()}, "the stages do not start")
    os.kill(process.pid, getattr(signal, name))
    process.join(WAIT_S)
    assert process.exitcode == 75
    assert f"{name}: ending ar/seed1, rear/seed1; rerun the command to resume" in (study.root / "output").read_text()
    for cell, stage in (("ar/seed1", hanging[0]), ("rear/seed1", hanging[1])):
        assert state(study, cell)["error"] == ""
        assert state(study, cell)["spent"] > 0
        (study.control / f"hang.{stage}").unlink()
    assert main(study.words("workers=2")) == 0
    assert state(study, "ar/seed1")["spent"] == 0


def test_a_stage_killed_by_a_signal_names_it(study: StubStudy, capsys: pytest.CaptureFixture) -> None:
    (study.control / "hang.ar.1.train").touch()
    process = study.start("workers=1")
    wait_until(lambda: study.calls(), "the stage does not start")
    os.kill(int((study.control / "calls").read_text().split("pid=")[1].split()[0]), signal.SIGKILL)
    process.join(WAIT_S)
    assert process.exitcode == 1
    assert "ar/seed1 failed: train: killed by SIGKILL (out of memory?)" in (study.root / "output").read_text()


def test_two_commands_share_the_cells(study: StubStudy, capsys: pytest.CaptureFixture) -> None:
    (study.control / "hang.ar.1.train").touch()
    first = study.start("workers=1")
    wait_until(lambda: study.calls(), "the first stage does not start")
    assert main(study.words("workers=1")) == 0  # all other cells
    assert sorted(study.calls()) == sorted({*ALL} - {"ar.1.sample", "ar.1.evaluate"})
    assert not (study.folder / "results.jsonl").exists()
    assert "not complete: ar/seed1 (running); rerun" in capsys.readouterr().out
    (study.control / "hang.ar.1.train").unlink()
    first.join(WAIT_S)
    assert first.exitcode == 0
    assert sorted(study.calls()) == sorted(ALL)
    assert len(results(study)) == 4


def test_each_worker_gets_a_gpu(study: StubStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.study.default_gpus", lambda: ["3", "5"])
    for arm in ("ar", "rear"):
        (study.control / f"fail.{arm}.1.train").write_text("no")
        (study.control / f"hang.{arm}.2.train").touch()
    with pytest.MonkeyPatch.context() as patch:
        released = []

        def sleep(seconds: float) -> None:
            if len(study.calls()) == 4 and not released:
                released.append([path.unlink() for path in study.control.glob("hang.*")])

        patch.setattr(runner.time, "sleep", sleep)
        assert main(study.words()) == 1
    lines = (study.control / "calls").read_text().splitlines()
    assert {line.split("gpu=")[1] for line in lines[:2]} == {"3", "5"}
    assert {line.split("gpu=")[1] for line in lines[2:4]} == {"3", "5"}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("workers=0", "workers=0: expected a whole number from 1"),
        ("worker=2", "command line: unknown key 'worker'; did you mean 'workers'"),
        ("seed=[1, 2]", "command line: unknown key 'seed'; did you mean 'seeds'"),
    ],
)
def test_wrong_words(study: StubStudy, word: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        main(study.words(word))
    assert not study.folder.exists()


def test_the_remaining_time() -> None:
    stages = ("train", "sample", "evaluate")
    done = State("a", 1, "", seconds={"train": 100.0, "sample": 10.0, "evaluate": 4.0})
    half = State("a", 2, "", seconds={"train": 80.0})
    new = State("b", 1, "")
    assert remaining_s(stages, [done, half, new], [], workers=1) == (14 + 104, False)
    assert remaining_s(stages, [done, half, new], [], workers=2) == (59, False)
    assert remaining_s(stages, [half, new], [], workers=8) == (40, True)  # nothing is known of sampling
    assert remaining_s(stages, [done], [], workers=8) == (0, False)
