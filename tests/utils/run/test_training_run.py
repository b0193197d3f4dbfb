"""A run of a model of two lines: warnings, notes, garbage collection, and `stop`."""

import gc
import json
import weakref
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.processes import run_ranks
from utils.config import load_config
from utils.run import training_run
from utils.run.launch import launch
from utils.run.metrics_file import read_metrics
from utils.run.status import read_status
from utils.run.training_run import GC_EVERY, TrainingRun


class Data:
    fingerprint = "data"
    class_names = None

    def __len__(self) -> int:
        return 50


@contextmanager
def begun(arguments: list[str]) -> Iterator[TrainingRun]:
    with launch(load_config(arguments)) as launched:
        data, provenance = launched.open_data(Data)
        model = nn.Linear(3, 2)
        run = TrainingRun(
            launched,
            provenance,
            num_samples=len(data),
            modules={"model": model},
            optimizers={"optimizer": (model, torch.optim.AdamW(model.parameters()))},
            memory_hint="less",
        )
        with run.begin():
            yield run


def do_step(run: TrainingRun) -> None:
    loss = torch.tensor(1.0)
    assert run.update_is_finite([loss, loss])
    run.add_metrics([{"train/loss": loss}], loss)
    run.end_step()
    if run.triggers.log:
        run.log_interval({})


@pytest.fixture
def arguments(tiny_arguments: list[str], tmp_path: Path) -> list[str]:
    return [*tiny_arguments, f"experiment.output_dir={tmp_path}/run", "training.max_train_steps=6"]


def save_twice(arguments: list[str]) -> None:
    with begun(arguments) as run:
        for _ in run.steps():
            do_step(run)
            run.save()
            assert (run._saver._thread is not None) == run.ctx.is_rank0
        run.finish()


@pytest.mark.multiprocess
def test_only_rank_0_copies_and_writes_the_state(arguments: list[str], tmp_path: Path) -> None:
    run_ranks(save_twice, [*arguments, "training.max_train_steps=2"], processes=2)
    assert (tmp_path / "run/checkpoint-2/manifest.json").is_file()


def test_notes_before_and_in_a_run_are_logged(arguments: list[str], tmp_path: Path) -> None:
    with launch(load_config(arguments)) as launched:
        launched.notes.append("before")
        _, provenance = launched.open_data(Data)
        run = TrainingRun(
            launched, provenance, num_samples=50, modules={"model": nn.Linear(1, 1)}, optimizers={}, memory_hint=""
        )
        assert [path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".lock")] == []
        with run.begin():
            run.note("at the beginning")
            for _ in run.steps():
                do_step(run)
                run.note("in a step")
            run.finish()
            run.note("at the end")
    log = (tmp_path / "run/log.txt").read_text()
    places = [log.index(note) for note in ("before", "at the beginning", "in a step", "at the end", "completed at")]
    assert places == sorted(places)


def test_a_warning_is_given_once(arguments: list[str], tmp_path: Path) -> None:
    with begun(arguments) as run:
        for step in run.steps():
            do_step(run)
            run.warn("odd", f"of step {step}")
        run.warn("other", "text")
        run.finish()
    log = (tmp_path / "run/log.txt").read_text()
    assert log.count("warning: odd: of step 0") == log.count("warning: odd") == 1
    assert read_status(tmp_path / "run").warning == "step 6: other: text"


def test_a_disk_without_room_for_two_checkpoints(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    needed = 3 * 8 * 4  # weights and two moments of 3 x 2 + 2 numbers
    for free, name in ((2 * needed, "enough"), (2 * needed - 1, "short")):
        monkeypatch.setattr(training_run.shutil, "disk_usage", lambda folder, free=free: usage(free))
        with begun([*arguments, f"experiment.output_dir={tmp_path / name}"]) as run:
            run.finish()
        assert ("disk" in read_status(tmp_path / name).warning) == (name == "short")


def test_a_stop_completes_the_run_after_one_more_step(arguments: list[str], tmp_path: Path) -> None:
    with begun([*arguments, "experiment.log_every=100"]) as run:
        for step in run.steps():
            do_step(run)
            if step == 1:
                run.stop("good enough")
        assert run.finish()
        run.export("model")
    status = read_status(tmp_path / "run")
    assert (status.status, status.step, status.reason, status.eta_s) == ("completed", 3, "good enough", 0)
    assert status.last_checkpoint == str(tmp_path / "run/checkpoint-3")
    assert (tmp_path / "run/model.safetensors").is_file()
    assert [row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl")] == [1, 3]  # the last step is logged
    with begun(arguments) as run:  # the same command continues
        for _ in run.steps():
            do_step(run)
        assert run.finish()
    status = read_status(tmp_path / "run")
    assert (status.status, status.step, status.reason) == ("completed", 6, "")


def stop_on_rank_1(arguments: list[str]) -> None:
    with begun(arguments) as run:
        for step in run.steps():
            do_step(run)
            if step == 2 and run.ctx.rank == 1:
                run.stop("good enough")
        assert run.state.global_step == 4
        assert run.finish()
        assert run.status == "completed"


@pytest.mark.multiprocess
def test_a_stop_of_one_rank_stops_all_after_the_same_step(arguments: list[str], tmp_path: Path) -> None:
    run_ranks(stop_on_rank_1, arguments, processes=2)
    assert read_status(tmp_path / "run").status == "completed"
    assert json.loads((tmp_path / "run/checkpoint-4/manifest.json").read_text())["state"]["global_step"] == 4


class Node:
    def __init__(self) -> None:
        self.itself = self


def test_garbage_waits_for_its_step(arguments: list[str]) -> None:
    before = gc.isenabled(), gc.get_freeze_count()
    with begun([*arguments, f"training.max_train_steps={GC_EVERY + 1}"]) as run:
        for step in run.steps():
            assert not gc.isenabled()
            if step == GC_EVERY - 2:
                garbage = weakref.ref(Node())
            if step >= GC_EVERY - 2:
                assert (garbage() is None) == (step == GC_EVERY)
            do_step(run)
        run.finish()
    assert (gc.isenabled(), gc.get_freeze_count()) == before


def fail_in_a_step(arguments: list[str]) -> None:
    with begun(arguments) as run:
        for _ in run.steps():
            assert not gc.isenabled()
            assert gc.get_freeze_count() > 0
            raise ZeroDivisionError("in a step")


def test_a_run_that_fails_in_a_step(arguments: list[str], tmp_path: Path) -> None:
    """Garbage collection is as it was, and the status names the rank."""
    with pytest.raises(ZeroDivisionError) as caught:
        fail_in_a_step(arguments)
    assert caught.traceback  # keeps the loop over the steps alive
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    status = read_status(tmp_path / "run")
    assert (status.status, status.step, status.reason) == ("failed", 0, "rank 0: in a step")
