"""The config of a run from its weights."""

from utils.config import load_config
from utils.errors import InputError
from utils.run.weights_path import find_run_folder, find_weights
from utils.schema import Config


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
