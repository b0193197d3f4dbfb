"""The picture of a run's metrics."""

import math
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from utils.run.tracking import read_metrics

COLUMNS = 4


def save_training_curves(metrics_path: Path, picture_path: Path) -> None:
    """Draw all metrics of metrics.jsonl against the step, a panel each."""
    rows = read_metrics(metrics_path)
    names = list(dict.fromkeys(name for row in rows for name in row if name != "step"))
    if not names:
        return
    lines = math.ceil(len(names) / COLUMNS)
    figure = Figure(figsize=(4 * COLUMNS, 3 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(lines, COLUMNS, squeeze=False).flat, names, strict=False):
        axes.plot(*zip(*((row["step"], row[name]) for row in rows if name in row), strict=True))
        axes.set_title(name)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    figure.savefig(picture_path, dpi=100)
