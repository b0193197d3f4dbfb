"""The picture of a run's metrics: what shares a panel, what is left out, and what a gap is."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from utils.run.curves import draw_curve, panel_grid, plain_label, save_figure, save_training_curves

Panels = dict[str, dict[str, np.ndarray]]  # by title: curves (2, points) by label


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The panels of the picture, as they are given their titles."""
    axes, original = [], Axes.set_title
    monkeypatch.setattr(Axes, "set_title", lambda self, title: axes.append(self) or original(self, title))
    return axes


def draw(folder: Path, drawn: list[Axes], *rows: dict[str, Any]) -> Panels:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_training_curves(folder / "metrics.jsonl", folder / "curves.png")
    return {axes.get_title(): {line.get_label(): np.array(line.get_data()) for line in axes.lines} for axes in drawn}


def test_training_and_validation_share_a_panel(tmp_path: Path, drawn: list[Axes]) -> None:
    rows = [{"step": step, "train/ar_loss": 7 - step, "train/correct_tokens": step / 9} for step in (1, 2, 3)]
    rows[1] |= {"val/ar_loss": 6.5, "val/ar_loss_noisy": 6.75}  # measured once
    panels = draw(tmp_path, drawn, *rows)
    assert list(panels) == ["cross-entropy, nats per code", "train/correct_tokens"]
    curves = panels["cross-entropy, nats per code"]
    assert {name: values.tolist() for name, values in curves.items()} == {
        "train/ar_loss": [[1, 2, 3], [6, 5, 4]],
        "val/ar_loss": [[2], [6.5]],
        "val/ar_loss_noisy": [[2], [6.75]],
    }
    assert [text.get_text() for text in drawn[0].get_legend().get_texts()] == list(curves)
    assert drawn[0].lines[1].get_marker() == "."
    assert drawn[0].get_xlabel() == "step"
    assert np.asarray(Image.open(tmp_path / "curves.png").convert("L")).std() > 10
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "curves.png"}


def test_every_other_metric_has_its_panel_unless_it_is_constant(tmp_path: Path, drawn: list[Axes]) -> None:
    rows = [
        {
            "step": step,
            "train/epoch": step / 100,
            "train/loss": 1 / step,
            "train/grad_norm": 1e-3**step,
            "train/grad_norm_max": 1e-2**step,
            "train/entropy": -step,
            "train/nonfinite_steps": 0,
            "perf/images_per_s": 80 + step,
            "perf/images_per_s_per_gpu": 40 + step / 2,
            "heldout/psnr": math.nan,
        }
        for step in (1, 2)
    ]
    panels = draw(tmp_path, drawn, *rows, {"step": 2, "eval/fid": 5.5})
    single = ["train/loss", "train/entropy", "perf/images_per_s", "eval/fid"]
    assert list(panels) == ["gradient norm before clipping", *single]
    assert [list(panels[name]) for name in single] == [[name] for name in single]
    assert [axes.get_yscale() for axes in drawn] == ["log", *["linear"] * 4]


def test_values_that_are_not_finite_are_a_gap(tmp_path: Path, drawn: list[Axes]) -> None:
    values = [3.0, math.nan, 1.0, math.inf, 2.0]
    panels = draw(tmp_path, drawn, *({"step": step, "train/loss": value} for step, value in enumerate(values)))
    np.testing.assert_array_equal(panels["train/loss"]["train/loss"], [range(5), values])
    assert drawn[0].get_ylim()[1] < 4


def test_a_first_row_is_drawn_and_no_row_is_no_picture(tmp_path: Path, drawn: list[Axes]) -> None:
    assert draw(tmp_path, drawn) == {}
    assert not (tmp_path / "curves.png").exists()
    panels = draw(tmp_path, drawn, {"step": 50, "train/loss": 6.0, "train/grad_norm": 2.0})
    assert {title: curves[title].tolist() for title, curves in panels.items()} == {
        "train/grad_norm": [[50], [2.0]],
        "train/loss": [[50], [6.0]],
    }


@pytest.mark.parametrize("name", ["$\\no_command$", "_hidden", "a$b"])
def test_labels_are_drawn_as_they_are(name: str, tmp_path: Path) -> None:
    figure, (axes,) = panel_grid(1)
    axes.set_title(plain_label(name))
    draw_curve(axes, name, ([1, 2], [1.0, 2.0]), label=plain_label(name))
    assert [text.get_text().replace("\\$", "$").strip() for text in axes.legend().get_texts()] == [name]
    save_figure(figure, tmp_path / "x.png")
