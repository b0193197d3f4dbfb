"""Reports of a run, on rank 0: metrics, warnings and pictures, to log.txt, metrics.jsonl, status.json and wandb."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from PIL import Image

from utils.config import Config
from utils.run.curves import save_training_curves
from utils.run.metrics_file import METRICS_FILE, MetricsFile
from utils.run.run_environment import log_and_continue, make_logger
from utils.run.status import StatusFile
from utils.run.tracking import WandbRun

LOG_TEXT = {  # the metrics in a line of log.txt
    "train/loss": "loss {:.4f}",
    "train/ar_loss": "ar_loss {:.4f}",
    "train/correct_tokens": "correct_tokens {:.4f}",
    "train/grad_norm": "grad_norm {:.3g}",
    "train/lr": "lr {:.3g}",
    "perf/images_per_s": "{:.1f} images/s",
    "perf/memory_gib": "{:.1f} GiB at the peak",
    "val/ar_loss": "validation ar_loss {:.4f}",
    "val/ar_loss_noisy": "perturbed {:.4f}",
    "val/correct_tokens": "correct_tokens {:.4f}",
}


class Reporter:
    """Reports on rank 0 and does nothing on other ranks.

    Attributes:
        logger: writes to log.txt and the console; silent on other ranks.
    """

    def __init__(self, config: Config, status: StatusFile, is_rank0: bool) -> None:
        self.output_dir = Path(config.experiment.output_dir)
        self.is_rank0 = is_rank0
        self.logger = make_logger(self.output_dir, is_rank0)
        self._status = status
        self._metrics = MetricsFile(self.output_dir / METRICS_FILE)
        self._wandb = WandbRun(config, self.output_dir)
        self._warned: set[str] = set()

    def begin(self, step: int, facts: dict[str, Any]) -> None:
        """`step`: steps done before this start; `facts`: of the launch, for wandb."""
        if not self.is_rank0:
            return
        self._metrics.begin(step)
        self._wandb.start(step, facts)
        self._status.now.url = self._wandb.url
        if self._wandb.url is not None:
            self.logger.info(f"wandb: {self._wandb.url}")
        if self._wandb.sync_command is not None:
            self.logger.info(f"wandb works offline; to upload: {self._wandb.sync_command}")

    def log(self, step: int, metrics: dict[str, float], steps_left: int = 0) -> None:
        """Report metrics of the state after `step` steps."""
        if not self.is_rank0:
            return
        self._metrics.append(step, metrics)
        self._wandb.log(metrics, step)
        texts = [text.format(metrics[name]) for name, text in LOG_TEXT.items() if name in metrics]
        eta_s = self._status.now.eta_s
        if eta_s and "train/loss" in metrics:
            texts.append(f"{3600 * steps_left / eta_s:.0f} steps/h, {timedelta(seconds=round(eta_s))} left")
        if texts:
            self.logger.info(f"step {step}: {', '.join(texts)}")
        self._status.update()

    def warn(self, step: int, title: str, text: str) -> None:
        """Warn the user, once per start for each title (less than 64 characters)."""
        if not self.is_rank0 or title in self._warned:
            return
        self._warned.add(title)
        self.logger.warning(f"warning: {title}: {text}")
        self._status.now.warning = f"step {step}: {title}: {text}"
        self._status.update()
        self._wandb.alert(title, text)

    def draw(self, step: int, name: str, make: Callable[[], Image.Image]) -> None:
        """Make a picture; an error is logged."""
        if self.is_rank0:
            self.logger.info(f"step {step}: drawing {name}")
            with log_and_continue(self.logger, f"{name} at step {step}", Exception):
                self.log_image(step, name, make())

    def log_image(self, step: int, name: str, image: Image.Image) -> None:
        """To wandb only; the caller writes the file."""
        if self.is_rank0:
            self._wandb.log_image(name, image, step)

    def draw_curves(self) -> None:
        """All metrics so far, as training_curves.png."""
        if self.is_rank0:
            with log_and_continue(self.logger, "training curves", Exception):
                save_training_curves(self._metrics.path, self.output_dir / "training_curves.png")

    def finish(self, exit_code: int, preempted: bool) -> None:
        """Write metrics delayed by a full disk, and end the run in wandb."""
        if self.is_rank0:
            with log_and_continue(self.logger, "metrics"):
                self._metrics.flush()
            self._wandb.finish(exit_code, preempted)
