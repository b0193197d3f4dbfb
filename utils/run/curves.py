"""The picture of a run's metrics."""

import math
from pathlib import Path

from utils.run.metrics_file import read_metrics

COLUMNS = 4
LENGTHS = ("step", "epoch", "dataset_passes")  # grow with the step


def save_training_curves(metrics_path: Path, picture_path: Path) -> None:
    """Draw the metrics of metrics.jsonl against the step, a panel for each that changes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here, for it slows the start of all ranks
    from matplotlib.figure import Figure

    rows = read_metrics(metrics_path)
    names = dict.fromkeys(name for row in rows for name in row if name not in LENGTHS)
    points = {name: [(row["step"], row[name]) for row in rows if name in row] for name in names}
    points = {name: pairs for name, pairs in points.items() if len({value for _, value in pairs}) > 1}
    if not points:
        return
    lines = math.ceil(len(points) / COLUMNS)
    figure = Figure(figsize=(4 * COLUMNS, 3 * lines))
    FigureCanvasAgg(figure)
    figure.subplots_adjust(0.04, 0.35 / (3 * lines), 0.99, 1 - 0.35 / (3 * lines), hspace=0.3)
    for place, (name, pairs) in enumerate(points.items(), start=1):
        axes = figure.add_subplot(lines, COLUMNS, place)
        axes.plot(*zip(*pairs, strict=True))
        axes.set_title(name)  # by step
    figure.savefig(picture_path, dpi=80)
