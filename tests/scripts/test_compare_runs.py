"""Runs side by side: the picture, the table of last values, the table of config keys, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from scripts import compare_runs
from tests.processes import Done, run_script
from utils.errors import InputError

SCRIPT = "scripts/compare_runs.py"


def make_run(folder: Path, rows: list[dict], config: str | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if config is not None:
        (folder / "config.yaml").write_text(config)
    return folder


def config_of(name: str, lr: str, extra: str = "") -> str:
    output = f"experiment: {{name: {name}, output_dir: out/{name}, project: p{extra}}}\n"
    return f"{output}optimizer: {{params: {{learning_rate: {lr}}}}}\n"


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    rows = [
        {"step": s, "train/ar_loss": 8.0 - s, "train/correct_tokens": s / 100, "train/epoch": s / 2} for s in (2, 4)
    ]
    shorter = [{**rows[0], "train/ar_loss": 7.5, "val/correct_tokens": 0.015}, {"step": 3, "train/ar_loss": 7.25}]
    return [
        make_run(tmp_path / "long", rows, config_of("a", "4e-4", ", tags: [x]")),
        make_run(tmp_path / "short", shorter, config_of("b", "1e-4")),
    ]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    axes, original = [], Axes.set_title
    monkeypatch.setattr(Axes, "set_title", lambda self, title: axes.append(self) or original(self, title))
    return axes


def compare(folder: Path, *arguments: object) -> Done:
    return run_script([SCRIPT, *map(str, arguments)], folder)


def test_tables_and_picture(runs: list[Path], tmp_path: Path) -> None:
    picture = tmp_path / "both.png"
    done = compare(tmp_path, runs[0], runs[1] / "metrics.jsonl", "--output", picture)
    assert (done.returncode, done.stderr) == (0, "")
    values, configs, where = done.stdout.rstrip().split("\n\n")
    assert values.splitlines() == [
        "| last value | long | short |",
        "| --- | --- | --- |",
        "| step | 4 | 3 |",
        "| train/ar_loss | 4 | 7.25 |",
        "| train/correct_tokens | 0.04 | 0.02 (step 2) |",
        "| train/epoch | 2 | 1 (step 2) |",
        "| val/correct_tokens | - | 0.015 (step 2) |",
    ]
    assert configs.splitlines() == [
        "| config | long | short |",
        "| --- | --- | --- |",
        "| experiment.tags | ['x'] | - |",
        "| optimizer.params.learning_rate | 0.0004 | 0.0001 |",
    ]
    assert where == f"picture: {picture}"
    assert np.asarray(Image.open(picture).convert("L")).std() > 10


def test_runs_are_overlaid(runs: list[Path], tmp_path: Path, drawn: list[Axes]) -> None:
    compare_runs.main(runs, ["one", "two"], "step", tmp_path / "x.png")
    assert [axes.get_title() for axes in drawn] == ["train/ar_loss", "train/correct_tokens (dashed: val)"]
    lines = [(line.get_label(), line.get_color(), line.get_linestyle()) for line in drawn[1].lines]
    assert lines == [("one", "C0", "-"), ("two", "C1", "-"), ("one", "C0", "--"), ("two", "C1", "--")]
    assert [line.get_xdata().tolist() for line in drawn[0].lines] == [[2, 4], [2, 3]]
    assert drawn[0].get_xlabel() == "step"


def test_epochs_are_those_of_the_step_and_none_is_made_up(runs: list[Path], tmp_path: Path, drawn: list[Axes]) -> None:
    early = {"step": 1, "train/ar_loss": 7.9}  # before the first epoch that is logged
    rows = [early, {"step": 2, "train/epoch": 1.5}, {"step": 4, "train/ar_loss": 5.0}]
    late = {"step": 6, "train/ar_loss": 4.0, "train/epoch": 2.5}  # the batch is smaller from step 2 on
    made = make_run(tmp_path / "other", [*rows, late])
    compare_runs.main([runs[1], made], None, "epoch", tmp_path / "x.png")
    first, second = (line.get_xdata() for line in drawn[0].lines)
    np.testing.assert_array_equal(first, [1, np.nan])  # at step 3 the epoch is not known yet
    np.testing.assert_allclose(second, [0.75, 2.0, 2.5])
    assert drawn[0].get_xlabel() == "epoch"
    with pytest.raises(InputError, match=r"--x epoch: found no train/epoch in the metrics of bare"):
        compare_runs.main([runs[0], make_run(tmp_path / "bare", [early])], None, "epoch", tmp_path / "x.png")


def test_no_other_file_is_overwritten(runs: list[Path]) -> None:
    metrics = runs[0] / "metrics.jsonl"
    before = metrics.read_bytes()
    with pytest.raises(InputError, match=r"--output .*metrics\.jsonl: expected a name that ends in \.png"):
        compare_runs.main(runs, None, "step", metrics)
    assert metrics.read_bytes() == before


def test_runs_of_other_metrics_get_a_panel_for_each(
    tmp_path: Path, drawn: list[Axes], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"step": 1, "train/l1": 0.3, "heldout/psnr": 20.0}]
    paths = [make_run(tmp_path / f"{name}/tokenizer", rows) for name in "ab"]
    compare_runs.main(paths, None, "step", tmp_path / "x.png")
    assert [axes.get_title() for axes in drawn] == ["train/l1", "heldout/psnr"]
    assert f"| last value | {paths[0]} | {paths[1]} |" in (printed := capsys.readouterr().out)
    assert f"configs are not compared: no config.yaml next to the metrics of {paths[0]}, {paths[1]}\n" in printed


def test_what_cannot_be_compared_is_one_line(runs: list[Path], tmp_path: Path) -> None:
    empty = make_run(tmp_path / "empty", [])
    for arguments, problem in (
        ([runs[0]], f"{runs[0]}: found one run, expected two or more"),
        ([runs[0], tmp_path], f"{tmp_path}/metrics.jsonl: no such file, expected a run folder or its metrics.jsonl"),
        ([runs[0], tmp_path / "absent"], f"{tmp_path}/absent: no such file, expected a run folder or"),
        ([runs[0], empty], f"{empty}/metrics.jsonl: holds no metrics yet"),
        ([*runs, "--labels", "a"], "--labels: found 1 for 2 runs, expected one for each"),
    ):
        done = compare(tmp_path, *arguments, "--output", tmp_path / "x.png")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"error: {problem}")
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "x.png").exists()
