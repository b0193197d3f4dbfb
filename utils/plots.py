"""Pictures of a training run."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from utils.tracking import read_metrics

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
