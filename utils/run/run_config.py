"""The config and the name of a run from the path of its weights."""

import re
from collections.abc import Sequence
from pathlib import Path

from utils.config import load_config
from utils.errors import InputError
from utils.run.weights_path import find_run_folder, find_weights
from utils.schema import Config

CELL = re.compile(r"(.+)/seed(\d+)")  # name of a run that is a cell of a study


def load_run_config(run: str, overrides: list[str]) -> Config:
    """The config of the run that wrote RUN, a run folder, checkpoint or weights file, or `config=` of the overrides;
    raises InputError without one."""
    sources = []
    if not any(override.startswith("config=") for override in overrides):
        folder = find_run_folder(find_weights(run))
        if folder is None:
            raise InputError(f"{run}: found no config.yaml of a run that wrote it; give config=FILE.yaml")
        sources = [f"config={folder / 'config.yaml'}"]
    return load_config([*sources, "experiment.output_dir=unused", f"experiment.generator_checkpoint={run}", *overrides])


def names_of_runs(runs: Sequence[str]) -> list[str]:
    """`<arm>/seed<k>` of cells of a study, else names of the folders; the paths if two names are equal.

    Raises InputError for a run that is given twice.
    """
    paths = [Path(run).resolve() for run in runs]
    for path, run in zip(paths, runs, strict=True):
        if paths.count(path) > 1:
            raise InputError(f"{run}: given twice, expected each run once")
    cells = [CELL.fullmatch("/".join(path.parts[-3:-1])) for path in paths]
    names = [path.name if cell is None else cell[0] for path, cell in zip(paths, cells, strict=True)]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]
