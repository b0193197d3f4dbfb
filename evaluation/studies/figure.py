"""The picture of a study: values of each seed by arm, and paired differences by hypothesis."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation.studies.report import Outcome, Results
from evaluation.studies.statistics import bootstrap_interval, percent
from utils.files.atomic import atomic_file

if TYPE_CHECKING:  # a slow import
    from matplotlib.axes import Axes

HEIGHT, WIDTH_PER_COLUMN, MARGIN = 3.6, 1.0, 1.6  # inches
POINT_STYLE: dict[str, Any] = {"markersize": 4, "alpha": 0.7}
MEAN_STYLE: dict[str, Any] = {
    "fmt": "D",
    "color": "black",
    "markersize": 5,
    "capsize": 4,
    "linewidth": 1.5,
    "zorder": 3,
}


def draw_study(results: Results, path: Path) -> None:
    """Write the PNG atomically; left the primary metric of each complete cell, right the differences in percent."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    outcomes = [outcome for outcome in results.outcomes() if outcome.contrast is not None]
    columns = [max(len(results.plan.file.arms), 2), *([max(len(outcomes), 2)] if outcomes else [])]
    width = sum(columns) * WIDTH_PER_COLUMN + MARGIN * len(columns)
    with rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(width, HEIGHT), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(1, len(columns), width_ratios=columns, squeeze=False)[0]
        _draw_arms(results, grid[0])
        if outcomes:
            _draw_differences(outcomes, results.plan.file.seeds, grid[1], results.plan.file.margin_pct)
        with atomic_file(path, f".{os.getpid()}.tmp") as partial:  # several commands may end at the same time
            figure.savefig(partial, dpi=120, format="png")


def _draw_arms(results: Results, axes: "Axes") -> None:
    file = results.plan.file
    values = [results.values(arm, file.metric) for arm in file.arms]
    for number, seed in enumerate(file.seeds):
        points = [(column, of_arm[seed]) for column, of_arm in enumerate(values) if seed in of_arm]
        axes.plot(*np.reshape(points, (-1, 2)).T, "o-", linewidth=0.6, color=f"C{number % 10}", **POINT_STYLE)
    for column, of_arm in enumerate(values):
        if len(of_arm) > 1:
            numbers = np.array([*of_arm.values()])
            low, high = bootstrap_interval(numbers)
            mean = numbers.mean()
            axes.errorbar(column + 0.15, mean, [[mean - low], [high - mean]], **MEAN_STYLE)
    _label_columns(axes, [*file.arms])
    axes.set_title(file.metric)
    axes.set_xlabel("a colour per seed; black: mean, 95 % interval", color="0.4")


def _draw_differences(outcomes: list[Outcome], seeds: list[int], axes: "Axes", margin_pct: float) -> None:
    axes.axhspan(-margin_pct, margin_pct, color="0.92", zorder=0)
    axes.axhline(0, color="0.5", linewidth=0.8)
    for column, outcome in enumerate(outcomes):
        assert outcome.contrast is not None
        for seed, difference in zip(outcome.seeds, outcome.contrast.differences, strict=True):
            axes.plot(column, percent(difference), "o", color=f"C{seeds.index(seed) % 10}", **POINT_STYLE)
        mean, low, high = outcome.contrast.effect_pct, outcome.contrast.low_pct, outcome.contrast.high_pct
        axes.errorbar(column + 0.15, mean, [[mean - low], [high - mean]], **MEAN_STYLE)
    names = [f"{one.name}\n{one.hypothesis.arm}\nvs {one.hypothesis.baseline}" for one in outcomes]
    _label_columns(axes, names)
    axes.set_title("paired differences in %")
    axes.set_xlabel(f"grey: less than {margin_pct:g} %", color="0.4")


def _label_columns(axes: "Axes", names: list[str]) -> None:
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.grid(axis="y", alpha=0.3)
