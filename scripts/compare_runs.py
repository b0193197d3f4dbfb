"""Overlay two or more training runs in one plot, with tables of their last values and of config keys that differ.

    python scripts/compare_runs.py outputs/rear_b outputs/rear_b_ar --labels reAR AR --output compare.png

A run is a run folder or its metrics.jsonl; it may still be training. Prints two tables in Markdown and writes the plot:
losses, token accuracy (dashed: validation), gradient norm and throughput. For runs without these metrics, such as a
tokenizer's, all metrics are plotted.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

import numpy as np
from omegaconf import OmegaConf

from utils.config import flat, read_yaml
from utils.console import markdown_table
from utils.errors import InputError, input_errors_exit
from utils.files.text import user_path
from utils.run.curves import NOT_DRAWN, Points, draw_curve, panel_grid, plain_label, points_of, save_figure
from utils.run.metrics_file import read_metrics

PANELS = (
    ("train/ar_loss",),
    ("val/ar_loss",),
    ("train/correct_tokens", "val/correct_tokens"),
    ("train/grad_norm",),
    ("perf/images_per_s",),
)
COLUMNS = 3
IGNORED_KEYS = ("experiment.output_dir", "experiment.name")  # differ between any two runs


@dataclass
class Run:
    label: str
    rows: list[dict[str, float]]
    config: dict[str, Any] | None  # by dotted key; None: no config.yaml next to the metrics


def main(paths: list[Path], labels: list[str] | None, x: str, output: Path) -> None:
    if len(paths) < 2:
        raise InputError(f"{paths[0]}: found one run, expected two or more")
    if output.suffix != ".png":
        raise InputError(f"--output {output}: expected a name that ends in .png")
    if labels is not None and len(labels) != len(paths):
        raise InputError(f"--labels: found {len(labels)} for {len(paths)} runs, expected one for each")
    runs = [load_run(path, label) for path, label in zip(paths, labels or labels_of(paths), strict=True)]
    draw(runs, x, output)
    print(last_values(runs), config_differences(runs), f"picture: {output}", sep="\n\n")


def labels_of(paths: list[Path]) -> list[str]:
    """Names of the run folders, or the paths if two names are equal."""
    names = [(path.parent if path.is_file() else path).resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def load_run(path: Path, label: str) -> Run:
    """Raises InputError for missing or unreadable metrics or config."""
    metrics = path / "metrics.jsonl" if path.is_dir() else path
    if not metrics.is_file():
        raise InputError(f"{metrics}: no such file, expected a run folder or its metrics.jsonl")
    rows = read_metrics(metrics)
    if not any(row.keys() - set(NOT_DRAWN) for row in rows):
        raise InputError(f"{metrics}: holds no metrics yet")
    config = metrics.with_name("config.yaml")
    if not config.is_file():
        return Run(label, rows, None)
    read_yaml(config)  # refuses what OmegaConf would expand without end
    return Run(label, rows, dict(flat(OmegaConf.to_container(OmegaConf.load(config)))))


def draw(runs: list[Run], x: str, output: Path) -> None:
    """Write the plot, with `x` (step or epoch) on the horizontal axis."""
    names = [name for name in names_of(runs) if name not in NOT_DRAWN]
    panels = [group for group in PANELS if set(group) & set(names)] or [(name,) for name in names]
    figure, grid = panel_grid(len(panels), COLUMNS, x)
    for axes, group in zip(grid, panels, strict=True):
        axes.set_title(plain_label(group[0] if len(group) == 1 else f"{group[0]} (dashed: val)"))
        for name, line in zip(group, ("-", "--"), strict=False):
            for number, run in enumerate(runs):
                draw_curve(
                    axes, name, curve(run, name, x), label=plain_label(run.label), color=f"C{number}", linestyle=line
                )
    grid[0].legend()
    save_figure(figure, output)


def names_of(runs: list[Run]) -> list[str]:
    """All metrics, in order of appearance."""
    return [*dict.fromkeys(name for run in runs for row in run.rows for name in row if name != "step")]


def curve(run: Run, name: str, x: str) -> Points:
    """Raises InputError for `x` = epoch if the run logged no epochs."""
    steps, values = points_of(run.rows, name)
    if x == "step":
        return steps, values
    known_steps, epochs = points_of(run.rows, "train/epoch")
    if not known_steps:
        raise InputError(f"--x epoch: found no train/epoch in the metrics of {run.label}; use --x step")
    return np.interp(steps, [0, *known_steps], [0, *epochs], right=np.nan).tolist(), values


def last_values(runs: list[Run]) -> str:
    """A table of metrics by run; values older than the run's last step have their step."""
    lines = [["step", *(str(run.rows[-1]["step"]) for run in runs)]]
    for name in names_of(runs):
        cells = []
        for run in runs:
            steps, values = points_of(run.rows, name)
            older = f" (step {steps[-1]})" if steps and steps[-1] != run.rows[-1]["step"] else ""
            cells.append(f"{values[-1]:.5g}{older}" if steps else "-")
        lines.append([name, *cells])
    return markdown_table(["last value", *(run.label for run in runs)], lines)


def config_differences(runs: list[Run]) -> str:
    """A table of config keys by run."""
    configs = [run.config for run in runs if run.config is not None]
    if len(configs) < len(runs):
        lacking = ", ".join(run.label for run in runs if run.config is None)
        return f"configs are not compared: no config.yaml next to the metrics of {lacking}"
    keys = dict.fromkeys(key for config in configs for key in config if key not in IGNORED_KEYS)
    lines = [[key, *(str(config.get(key, "-")) for config in configs)] for key in keys]
    differing = [line for line in lines if len(set(line[1:])) > 1]
    head = ["config", *(run.label for run in runs)]
    return markdown_table(head, differing) if differing else "configs: no key differs"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=user_path, nargs="+", metavar="RUN", help="run folder or metrics.jsonl")
    parser.add_argument(
        "--output", type=user_path, default=Path("compare.png"), help="the picture (default: %(default)s)"
    )
    parser.add_argument("--labels", nargs="+", help="names of the runs (default: those of their folders)")
    parser.add_argument("--x", choices=("step", "epoch"), default="step", help="horizontal axis (default: %(default)s)")
    with input_errors_exit():
        arguments = parser.parse_intermixed_args()
        main(arguments.runs, arguments.labels, arguments.x, arguments.output)
