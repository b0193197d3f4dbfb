"""The mirror of a run in wandb."""

import secrets
import shlex
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from utils.config import Config
from utils.errors import first_line
from utils.files.atomic import write_text

INIT_TIMEOUT_S = 30  # wandb's default of 90 s delays the first step when its server cannot be reached
FINISH_TIMEOUT_S = 60  # wandb's default waits forever for an upload that hangs
STEP = "train/step"  # the x axis; wandb's own step may not decrease, but steps are repeated after a kill


class WandbRun:
    """Mirrors a run to wandb, on rank 0. An error of wandb is a warning, and training continues.

    The mode (online, offline, disabled) comes from the environment or wandb's settings file. An online run that
    cannot start becomes an offline one. A run that starts at step 0 is a new run in wandb; a resumed one continues the
    run whose id is in `<output_dir>/wandb_run_id`.

    Attributes:
        url: address of an online run.
        sync_command: uploads an offline run.
    """

    def __init__(self, config: Config, output_dir: Path) -> None:
        self.config = config
        self.output_dir = output_dir
        self.url: str | None = None
        self.sync_command: str | None = None
        self._run: Any = None
        self._has_warned = False

    def start(self, first_step: int, facts: dict[str, Any]) -> None:
        """`first_step`: steps done before this start; `facts`: of the launch, shown as `run` next to the config's
        keys."""
        if not self.config.training.enable_wandb:
            return
        with self._errors_warn("did not start"):
            self._start(first_step, facts)

    def _start(self, first_step: int, facts: dict[str, Any]) -> None:
        import wandb

        mode = wandb.setup(wandb.Settings(show_info=False)).settings.mode  # shows warnings and errors only
        id_file = self.output_dir / "wandb_run_id"
        run_id = secrets.token_hex(4)
        if first_step > 0 and id_file.is_file():
            run_id = id_file.read_text(encoding="utf-8").split()[0]
        if mode != "disabled":
            write_text(id_file, run_id + "\n")
        self._run = open_run(self.config, self.output_dir, run_id, facts, is_online=mode == "online")
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)
        if self._run.offline:
            # One by one, since `wandb sync` stops at a log that a kill has truncated.
            logs = shlex.quote(str(self.output_dir / "wandb/offline-run-")) + "*"
            self.sync_command = f'for run in {logs}; do wandb sync "$run"; done'
        elif not self._run.disabled:
            self.url = self._run.url

    def log(self, values: dict[str, float], step: int) -> None:
        if self._run is not None:
            with self._errors_warn(f"lacks values of step {step}"):
                self._run.log(values | {STEP: step})

    def log_image(self, name: str, image: Image.Image, step: int) -> None:
        if self._run is not None:
            with self._errors_warn(f"lacks an image of step {step}"):
                import wandb

                self._run.log({name: wandb.Image(image), STEP: step})

    def alert(self, title: str, text: str) -> None:
        """Notify the user by mail or in a channel, as set in wandb; titles have less than 64 characters."""
        if self._run is not None:
            with self._errors_warn("was not sent an alert"):
                self._run.alert(title, text, level="WARN")

    def finish(self, exit_code: int, preempted: bool = False) -> None:
        """Upload the rest, for FINISH_TIMEOUT_S at most.

        Args:
            exit_code: the process's exit status; wandb shows the run as failed or preempted only if it is not 0.
            preempted: the run will be started again.
        """
        if self._run is not None:
            with self._errors_warn("did not finish"):
                if preempted:
                    self._run.mark_preempting()
                self._run.finish(exit_code)

    @contextmanager
    def _errors_warn(self, what: str) -> Iterator[None]:
        """Turn any error of wandb into a warning, once per run."""
        try:
            yield
        except Exception as error:
            if not self._has_warned:
                reason = "it is not installed" if isinstance(error, ImportError) else first_line(error)
                warnings.warn(f"wandb {what} ({reason}); training continues", stacklevel=4)
            self._has_warned = True


def open_run(config: Config, output_dir: Path, run_id: str, facts: dict[str, Any], is_online: bool) -> Any:
    """A wandb run; offline, with a warning, if it cannot be online."""
    import wandb

    experiment = config.experiment
    arguments: dict[str, Any] = {
        "project": experiment.project,
        "name": experiment.name,
        "entity": experiment.entity,
        "group": experiment.group,
        "tags": experiment.tags,
        "dir": str(output_dir),
        "config": {**asdict(config), "run": facts},
        "id": run_id,
        "resume": "allow",  # offline too: `wandb sync` reads it from the log
        "settings": wandb.Settings(
            init_timeout=INIT_TIMEOUT_S, finish_timeout=FINISH_TIMEOUT_S, finish_timeout_raises=True
        ),
    }
    try:
        if is_online and not wandb.login(prompt=False):  # wandb.init would wait at a prompt
            raise wandb.errors.UsageError("no API key; run `wandb login` or set WANDB_API_KEY")
        return wandb.init(**arguments)
    except Exception as error:  # many error classes: no login, no network, server down
        reason = first_line(error)
    try:
        run = wandb.init(**arguments, mode="offline")
    except Exception as error:  # such as a full disk
        raise RuntimeError(f"{reason}; offline: {first_line(error)}") from error
    warnings.warn(f"wandb is offline for this run ({reason}); training continues", stacklevel=5)
    return run
