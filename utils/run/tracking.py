"""The mirror of a run in wandb."""

import json
import secrets
import shlex
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from utils.config import Config
from utils.errors import InputError, first_line
from utils.files.atomic import write_text
from utils.run.metrics_file import METRICS_FILE, read_metrics

INIT_TIMEOUT_S = 30  # wandb's own default of 90 s holds up the first step when its server is out of reach
FINISH_TIMEOUT_S = 60  # by default wandb waits without end for an upload that hangs
STEP = "train/step"  # wandb's own step may not decrease, but steps are run again after a kill
BUFFER_BYTES = 32_768  # that wandb holds back before it writes them to its log
SENT_UNTIL = "sent_until"  # in wandb_run_id, behind the id, with a step: what is known to have arrived


class Dashboard:
    """Mirrors a run to wandb; whatever wandb does, training goes on. For the main process only.

    The mode (online, offline, disabled, shared) is that of the environment or of wandb's settings file. Only an online
    run that cannot begin becomes an offline one, with a warning that gives the reason. A start from step 0 is a new run
    in wandb, one that goes on continues the run in `<output_dir>/wandb_run_id`.

    Args:
        first_step: steps that are done already.
        facts: shown as `run` beside the keys of the config.

    Attributes:
        url: of an online run.
        sync_command: what uploads an offline run.
    """

    def __init__(self, config: Config, output_dir: Path, first_step: int, facts: dict[str, Any]) -> None:
        self.url: str | None = None
        self.sync_command: str | None = None
        self._run: Any = None
        self._failed = False  # from then on only the exit code is sent
        self._sent_until = first_step
        self._id_file = output_dir / "wandb_run_id"
        if config.training.enable_wandb:
            try:
                self._start(config, output_dir, first_step, facts)
            except ImportError:
                warnings.warn("wandb is not installed: metrics go to metrics.jsonl only", stacklevel=2)
            except Exception as error:
                self._fail("it did not start", error)

    def _start(self, config: Config, output_dir: Path, first_step: int, facts: dict[str, Any]) -> None:
        import wandb

        mode = wandb.setup(wandb.Settings(show_info=False)).settings.mode  # warnings and errors are shown
        recorded = self._id_file.read_text().split() if first_step > 0 and self._id_file.is_file() else []
        self._id = recorded[0] if recorded else secrets.token_hex(4)
        if mode != "disabled":
            write_text(self._id_file, self._id + "\n")
        self._run = open_run(config, output_dir, self._id, facts, mode)
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)
        if self._run.offline:
            # One by one: within one command the log of a killed start, which may end in half a record, keeps those of
            # later starts from being uploaded. They continue the run because each says `resume`.
            runs = shlex.quote(str(output_dir / "wandb/offline-run-")) + "*"
            self.sync_command = f'for run in {runs}; do wandb sync "$run"; done'
        elif not self._run.disabled:
            self.url = self._run.url
        if recorded:
            sent_until = int(recorded[2]) if SENT_UNTIL in recorded else None
            self._sent_until = first_step if sent_until is None else sent_until
            for row in unsent_rows(output_dir / METRICS_FILE, first_step, sent_until):
                self.log({name: value for name, value in row.items() if name != "step"}, int(row["step"]))

    def log(self, values: dict[str, float], step: int) -> None:
        if self._run is None or self._failed:
            return
        try:
            self._run.log({**values, STEP: step})
            self._sent_until = step
        except Exception as error:  # whatever a dashboard raises, training is worth more
            self._fail(f"from step {step}", error)
            self._note_sent()

    def log_image(self, name: str, image: Image.Image, step: int) -> None:
        def send() -> None:
            import wandb

            self._run.log({name: wandb.Image(image), STEP: step})

        self._try("a picture", send)

    def alert(self, title: str, text: str) -> None:
        """A message to the user, by mail or in a channel, as set in wandb.

        Args:
            title: less than 64 characters.
        """
        self._try("an alert", lambda: self._run.alert(title, text, level="WARN"))

    def finish(self, exit_code: int, preempted: bool = False) -> None:
        """Upload what is left, for FINISH_TIMEOUT_S at most.

        Args:
            exit_code: of the process; wandb shows a run as failed, or as preempted, only if it is not 0.
            preempted: the run will be started again.
        """
        if self._run is None:
            return
        try:
            if preempted:
                self._run.mark_preempting()
            self._run.finish(exit_code)
            if not (self._failed or self._run.disabled):
                self._note_sent()
        except Exception as error:
            if not self._failed:
                self._fail("it did not finish", error)
        self._run = None

    def _try(self, what: str, send: Callable[[], None]) -> None:
        """What may be missed by itself: the metrics go on."""
        if self._run is None or self._failed:
            return
        try:
            send()
        except Exception as error:
            warnings.warn(f"{what} did not reach wandb: {first_line(error)}", stacklevel=3)

    def _note_sent(self) -> None:
        with suppress(OSError):  # the next start sends less
            write_text(self._id_file, f"{self._id}\n{SENT_UNTIL} {self._sent_until}\n")

    def _fail(self, what: str, error: Exception) -> None:
        self._failed = True
        warnings.warn(f"wandb is off ({what}: {first_line(error)}); training goes on", stacklevel=4)


def open_run(config: Config, output_dir: Path, run_id: str, facts: dict[str, Any], mode: str) -> Any:
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
        "resume": "allow",  # an offline run, too, keeps this in its log, for `wandb sync`
        "settings": wandb.Settings(
            init_timeout=INIT_TIMEOUT_S, finish_timeout=FINISH_TIMEOUT_S, finish_timeout_raises=True
        ),
    }
    try:
        if mode == "online" and not wandb.login(prompt=False):  # wandb.init would wait at a prompt
            raise wandb.errors.UsageError("no API key; run `wandb login` or set WANDB_API_KEY")
        return wandb.init(**arguments)
    except Exception as error:  # no login, no network, a server that is down: each raises its own class
        reason = first_line(error)
    try:
        run = wandb.init(**arguments, mode="offline")
    except Exception as error:  # such as a full disk
        raise RuntimeError(f"{reason}; offline: {first_line(error)}") from error
    warnings.warn(f"wandb is offline for this run ({reason}); training goes on", stacklevel=4)
    return run


def unsent_rows(path: Path, step: int, sent_until: int | None) -> list[dict[str, float]]:
    """Rows up to a step that wandb may lack.

    Args:
        sent_until: step up to which it has all; None: a kill has cut it off, and what it held back is not known.
    """
    try:
        rows = [row for row in read_metrics(path) if row["step"] <= step]
    except InputError:  # others tell of it
        return []
    if sent_until is not None:
        return [row for row in rows if row["step"] > sent_until]
    size, first = 0, len(rows)
    while first > 0 and size < BUFFER_BYTES:
        first -= 1
        size += len(json.dumps(rows[first]))  # less than wandb writes for it, so these are more rows than it held back
    return rows[first:]
