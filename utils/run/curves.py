"""Plots of metrics against the step."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.files.atomic import atomic_file
from utils.run.metrics_file import read_metrics

if TYPE_CHECKING:  # a slow import, needed on rank 0 only
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = tuple[list[float], list[float]]  # steps and values

COLUMNS = 3
PANEL_INCHES = (3.2, 2.4)  # 960 pixels in all: text stays readable at the width of a README
MAX_MARKERS = 40  # curves with fewer points have markers, without which a single point is invisible
# Panels of several metrics with one unit, by a pattern of their names; every other metric has a panel of its own.
PANELS = {
    "cross-entropy, nats per code": r"(train|val)/ar_loss|val/ar_loss_noisy",
    "token accuracy": r"(train|val)/correct_tokens",
    "gradient norm before clipping": r"train/grad_norm(_max)?",
    "cosine of projection and target": r"(train|val)/\w+_cos",  # of each tap
}
LOGARITHMIC = ("train/grad_norm", "train/grad_norm_max")
# Proportional to the step or to perf/images_per_s.
NOT_DRAWN = ("step", "train/epoch", "train/dataset_passes", "perf/images_per_s_per_gpu", "perf/step_ms")


def save_training_curves(metrics_path: Path, picture_path: Path) -> None:
    """Plot the metrics of a run that change; without any, write nothing. Raises InputError if the metrics cannot be
    read."""
    rows = read_metrics(metrics_path)
    names = dict.fromkeys(name for row in rows for name in row if name not in NOT_DRAWN)
    curves = {name: points for name in names if changes(points := points_of(rows, name))}
    panels: dict[str, list[str]] = {}
    for title, pattern in PANELS.items():
        if present := [name for name in curves if re.fullmatch(pattern, name)]:
            panels[title if len(present) > 1 else present[0]] = present
    grouped = {name for in_panel in panels.values() for name in in_panel}
    panels |= {name: [name] for name in curves if name not in grouped}
    if not panels:
        return
    figure, grid = panel_grid(len(panels))
    for axes, (title, in_panel) in zip(grid, panels.items(), strict=True):
        axes.set_title(title)
        for name in in_panel:
            draw_curve(axes, name, curves[name], label=name)
        if len(in_panel) > 1:
            axes.legend(fontsize="small" if len(in_panel) <= 3 else "x-small")
    save_figure(figure, picture_path)


def points_of(rows: Sequence[dict[str, float]], name: str) -> Points:
    """Points of the rows that have the metric. A NaN stays, as a gap in the curve."""
    pairs = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in pairs], [value for _, value in pairs]


def changes(points: Points) -> bool:
    """Whether there are two different values, or a single measurement."""
    finite = [value for value in points[1] if math.isfinite(value)]
    return len(set(finite)) > 1 or len(finite) == len(points[1]) == 1


def panel_grid(count: int, columns: int = COLUMNS, x_label: str = "step") -> tuple["Figure", list["Axes"]]:
    """A figure with `count` panels in rows, which share their x axis."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    columns = min(count, columns)
    lines = math.ceil(count / columns)
    width, height = PANEL_INCHES[0] * columns, PANEL_INCHES[1] * lines
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels: list[Axes] = []
    with rc_context({"axes.titlesize": "medium", "axes.spines.top": False, "axes.spines.right": False}):
        for index in range(1, count + 1):
            panels.append(figure.add_subplot(lines, columns, index, sharex=panels[0] if panels else None))
            panels[-1].grid(alpha=0.3)
    if x_label == "step":
        panels[0].xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1))
        panels[0].xaxis.set_major_formatter(EngFormatter(sep=""))  # 50k
    for axes in panels[-columns:]:
        axes.set_xlabel(x_label)
    return figure, panels


def draw_curve(axes: "Axes", name: str, points: Points, **style: Any) -> None:
    """Add the curve of a metric to a panel; `style` is matplotlib's."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    marker = "." if len(points[0]) <= MAX_MARKERS else ""
    axes.plot(*points, marker=marker, linewidth=1.2, **style)
    if name in LOGARITHMIC:
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def plain_label(text: str) -> str:
    """Text for legend or title: matplotlib reads `$...$` as mathematics and leaves out labels that begin with `_`."""
    escaped = text.replace("$", r"\$")
    return f" {escaped}" if text.startswith("_") else escaped


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a PNG atomically."""
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=100, format="png")
