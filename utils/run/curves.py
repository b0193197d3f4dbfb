"""Pictures of a training run and of its data."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from utils.run.tracking import read_metrics

PANELS = ["train/ar_loss", "train/proj_loss", "train/correct_tokens", "lr", "perturbation_ratio", "grad_norm"]


def save_training_curves(metrics_path: Path, picture_path: Path) -> None:
    """Draw the curves of metrics.jsonl against the step, a panel each."""
    rows = read_metrics(metrics_path)
    figure = Figure(figsize=(12, 6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True) if points else ([], []))
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
