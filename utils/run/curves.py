"""Pictures of a training run and of its data."""

import math
from pathlib import Path

import numpy as np
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


def save_histograms(counts: dict[str, np.ndarray], picture_path: Path) -> None:
    """Draw counts (K,) as steps, a panel for each name."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, values) in zip(figure.subplots(1, len(counts), squeeze=False).flat, counts.items(), strict=True):
        axes.stairs(values, fill=True)
        axes.set_title(name)
        axes.grid(alpha=0.3)
    figure.savefig(picture_path, dpi=100)
