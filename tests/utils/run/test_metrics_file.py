import json
import math
import os
from pathlib import Path

import pytest

from utils.errors import InputError
from utils.run.metrics_file import MetricsFile, read_metrics


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def steps(path: Path) -> list[float]:
    return [row["step"] for row in read_metrics(path)]


def test_every_line_is_json_and_numbers_that_json_lacks_are_null(path: Path) -> None:
    metrics = MetricsFile(path)
    metrics.begin(0)
    metrics.append(1, {"loss": math.nan, "norm": math.inf, "lr": 0.5})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    started, row = (json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines())
    assert started["step"] == 0
    assert started["started"].endswith("+00:00")
    assert row == {"step": 1, "loss": None, "norm": None, "lr": 0.5}
    (read,) = read_metrics(path)
    assert math.isnan(read["loss"])
    assert read["lr"] == 0.5


def test_a_start_appends_and_drops_the_rows_that_are_run_again(path: Path) -> None:
    for first_step, last_step in ((0, 6), (4, 7), (2, 3)):  # killed after a checkpoint; back to an earlier one
        before = path.read_bytes() if path.exists() else b""
        metrics = MetricsFile(path)
        metrics.begin(first_step)
        for step in range(first_step + 1, last_step + 1):
            metrics.append(step, {"loss": 10.0 * first_step + step})
        assert path.read_bytes().startswith(before)
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [(1, 1.0), (2, 2.0), (3, 23.0)]


def test_lines_of_one_step_are_one_row_in_the_order_of_steps(path: Path) -> None:
    MetricsFile(path).append(2, {"loss": 1.0, "lr": 3.0})
    MetricsFile(path).append(4, {"loss": 2.0})
    MetricsFile(path).append(2, {"fid": 5.0, "lr": 4.0})  # by another program
    MetricsFile(path).append(3, {"fid": 6.0})
    assert read_metrics(path) == [
        {"step": 2, "loss": 1.0, "lr": 4.0, "fid": 5.0},
        {"step": 3, "fid": 6.0},
        {"step": 4, "loss": 2.0},
    ]


@pytest.mark.parametrize("torn", ['{"step": 3, "tr', "{", '{"step": 3}', "\0\0\0"])
def test_a_torn_last_line_costs_no_other(path: Path, torn: str) -> None:
    """Of a file from before starts were noted."""
    path.write_text(f'{{"step": 1}}\n{{"step": 2}}\n{torn}')
    whole = [3] if torn.endswith("}") else []
    assert steps(path) == [1, 2, *whole]
    MetricsFile(path).append(2, {"fid": 5.0})  # by the evaluator, before the run is resumed
    MetricsFile(path).begin(3)
    MetricsFile(path).append(4, {})
    assert steps(path) == [1, 2, *whole, 4]
    path.write_text('{"step": 1}\n{"st\n{"step": 1, "started": "2026"}\n{"step": 2}\n')
    assert steps(path) == [1, 2]


@pytest.mark.parametrize(
    "damaged",
    ['{"step": 2, "lo', "[2]", '{"loss": 1}', '{"step": null}', '{"step": 2, "loss": "x"}', "[" * 100_000, '"step"'],
)
def test_another_damaged_line_is_named(path: Path, damaged: str) -> None:
    path.write_text(f'{{"step": 1}}\n{damaged}\n{{"step": 3}}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl: line 2: found .*, expected a JSON object with a step"):
        read_metrics(path)
    with pytest.raises(InputError, match="absent: No such file"):
        read_metrics(path.with_name("absent"))


def test_a_full_disk_leaves_no_half_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = MetricsFile(path)
    metrics.append(1, {})
    opened = Path.open

    def open_full(self: Path, mode: str = "r", **options: object):
        if mode != "a":
            return opened(self, mode, **options)
        with opened(self, "a") as file:
            file.write('{"st')
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.warns(UserWarning, match="No space left"):
        metrics.append(2, {})
    monkeypatch.undo()
    assert path.read_text() == '{"step": 1}\n'
    metrics.append(3, {})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
