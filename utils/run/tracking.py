"""Metrics of a run: metrics.jsonl always, wandb where it works. A tracker never stops a training run."""

import json
import os
import secrets
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from utils.config import Config
from utils.errors import InputError, environment_error
from utils.files.atomic import write_text

INIT_TIMEOUT_S = 30  # wandb's own default of 90 s holds up the first step when its server is out of reach


class Tracker:
    """Appends to `<output_dir>/metrics.jsonl` and mirrors to wandb.

    For the main process only. When wandb cannot be reached, the run goes on offline with one warning
    (`wandb sync` uploads it later); without the package it goes on with the local file alone.
    """

    def __init__(self, config: Config, output_dir: Path, first_step: int) -> None:
        self.path = output_dir / "metrics.jsonl"
        keep_metrics_until(self.path, first_step)
        self._unwritten = ""
        self.wandb_run = start_wandb(config, output_dir) if config.training.enable_wandb else None

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._unwritten += json.dumps({"step": step, **metrics}) + "\n"
        try:
            self._write()
        except OSError as error:
            warnings.warn(f"{self.path}: {environment_error(error)}; its lines wait for the next ones", stacklevel=2)
        self._to_wandb(metrics, step)

    def _write(self) -> None:
        """Append what is not written yet, or nothing of it."""
        size = self.path.stat().st_size
        try:
            with self.path.open("a") as file:
                file.write(self._unwritten)
        except OSError:
            os.truncate(self.path, size)
            raise
        self._unwritten = ""

    def log_image(self, name: str, image: Image.Image, step: int) -> None:
        """To wandb only; the caller keeps the file."""
        if self.wandb_run is not None:
            import wandb

            self._to_wandb({name: wandb.Image(image)}, step)

    def flush(self) -> None:
        """
        Raises:
            OSError: metrics are still not written.
        """
        if self._unwritten:
            self._write()

    def finish(self) -> None:
        if self.wandb_run is None:
            return
        try:
            self.wandb_run.finish()
        except Exception as error:  # the upload; the local files are complete
            warnings.warn(f"wandb did not finish: {error}", stacklevel=2)

    def _to_wandb(self, values: dict[str, Any], step: int) -> None:
        if self.wandb_run is None:
            return
        try:
            self.wandb_run.log(values, step=step)
        except Exception as error:  # whatever a tracker raises, training is worth more
            warnings.warn(f"wandb is off from step {step}: {error}", stacklevel=2)
            self.wandb_run = None


def start_wandb(config: Config, output_dir: Path) -> Any:
    """A wandb run that continues the one recorded in `<output_dir>/wandb_run_id`, or None without the package.

    The mode (online, offline, disabled, shared) is that of the environment or of wandb's settings file. Only an online
    run that cannot begin becomes an offline one, with a warning that gives the reason.
    """
    try:
        import wandb
    except ImportError:
        warnings.warn("wandb is not installed: metrics go to metrics.jsonl only", stacklevel=3)
        return None
    id_file = output_dir / "wandb_run_id"
    run_id = id_file.read_text().strip() if id_file.is_file() else secrets.token_hex(4)
    id_file.write_text(run_id)
    arguments: dict[str, Any] = {
        "project": config.experiment.project,
        "name": config.experiment.name,
        "entity": config.experiment.entity,
        "dir": str(output_dir),
        "config": asdict(config),
        "id": run_id,
        "resume": "allow",
    }
    settings = wandb.Settings(init_timeout=INIT_TIMEOUT_S, silent=True, console="off")
    try:
        mode = wandb.setup().settings.mode  # of WANDB_MODE or of wandb's settings file
        if mode == "online" and not wandb.login(prompt=False):  # wandb.init would wait at a prompt
            raise wandb.errors.UsageError("no API key; run `wandb login` or set WANDB_API_KEY")
        return wandb.init(**arguments, settings=settings)
    except Exception as error:  # no login, no network, a server that is down: each raises its own class
        reason = str(error).splitlines()[0]
    try:
        run = wandb.init(**{**arguments, "resume": None}, settings=settings, mode="offline")
    except Exception as error:  # such as a full disk
        warnings.warn(f"wandb is off for this run ({reason}; offline: {error}); training goes on", stacklevel=3)
        return None
    warnings.warn(f"wandb is offline for this run ({reason}); training goes on", stacklevel=3)
    return run


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl.

    Raises:
        InputError: no such file, or one that is damaged.
    """
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: found a line that is no JSON: {error}") from error


def keep_metrics_until(path: Path, step: int) -> None:
    """Drop the lines of later steps: those steps are about to be run again from a checkpoint."""
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    write_text(path.resolve(), "".join(line.decode() for line in lines if _is_kept(line, step)))


def _is_kept(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):  # a full disk or a power cut has left half a line
        return False
