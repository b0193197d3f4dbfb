"""What a run tells of itself while it goes on, in one place for all who listen."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from PIL import Image

from utils.config import Config
from utils.distributed import DistributedContext
from utils.run.alerts import Alerts
from utils.run.clock import StepClock
from utils.run.curves import save_training_curves
from utils.run.manifest import TrainingState
from utils.run.memory_estimate import MemoryEstimate
from utils.run.metrics_file import METRICS_FILE, MetricsFile
from utils.run.resume import last_step
from utils.run.run_environment import log_and_continue, make_logger
from utils.run.status import StatusKeeper
from utils.run.tracking import Dashboard

IN_THE_LOG = {  # of a line of metrics, what the log tells in short
    "train/loss": "loss {:.4f}",
    "train/ar_loss": "ar_loss {:.4f}",
    "train/correct_tokens": "correct_tokens {:.4f}",
    "train/grad_norm": "grad_norm {:.3g}",
    "train/lr": "lr {:.3g}",
    "perf/images_per_s": "{:.1f} images/s",
    "perf/memory_gib": "{:.1f} GiB at the peak",
    "val/ar_loss": "held-out ar_loss {:.4f}",
    "val/ar_loss_noisy": "with noise {:.4f}",
    "val/correct_tokens": "correct_tokens {:.4f}",
}


class Reporter:
    """Metrics go to log.txt, metrics.jsonl, status.json and, where it works, to wandb; warnings too. Only rank 0 tells.

    Args:
        state: from which this start goes on, and then where the run stands.

    Attributes:
        logger: of log.txt and the console, silent on other ranks than 0.
        alerts: warnings.
    """

    def __init__(
        self,
        config: Config,
        ctx: DistributedContext,
        status: StatusKeeper,
        state: TrainingState,
        plan: MemoryEstimate,
        clock: StepClock,
    ) -> None:
        self.config, self.output_dir, self._tells = config, Path(config.experiment.output_dir), ctx.is_rank0
        self._world, self._status, self._state, self._plan, self._clock = ctx, status, state, plan, clock
        self.logger = make_logger(self.output_dir, ctx.is_rank0)
        self.alerts = Alerts(self._warn)
        self._metrics = MetricsFile(self.output_dir / METRICS_FILE)
        self._dashboard: Dashboard | None = None

    def begin(self, facts: dict[str, Any], notices: list[str]) -> None:
        """What will run, to all who listen.

        Args:
            facts: of the run, for the dashboard.
            notices: lines for the log.
        """
        if not self._tells:
            return
        step = self._state.global_step
        self._metrics.begin(step)
        facts = facts | {"parameters": self._plan.parameters}
        self._dashboard = Dashboard(self.config, self.output_dir, step, facts)
        self._status.now.url = self._dashboard.url
        for line in notices:
            self.logger.info(line)
        self.logger.info(
            f"{facts['samples']} samples, {facts['global_batch_size']} per step on {facts['processes']} processes, "
            f"steps {step} to {last_step(self.config.training)}"
        )
        self.logger.info(str(self._plan))
        if self._dashboard.url is not None:
            self.logger.info(f"wandb: {self._dashboard.url}")
        if self._dashboard.sync_command is not None:
            self.logger.info(f"wandb works offline; to upload: {self._dashboard.sync_command}")
        self.check_disk()

    def check_disk(self) -> None:
        """Warn if the next checkpoints may not fit."""
        self.alerts.check_disk(self.output_dir, self._plan.checkpoint_bytes)

    def log(self, metrics: dict[str, float]) -> None:
        """A line of metrics, of the steps up to now or of the state that they led to."""
        if not self._tells:
            return
        self._metrics.append(self._state.global_step, metrics)
        if self._dashboard is not None:
            self._dashboard.log(metrics, self._state.global_step)
        parts = [form.format(metrics[name]) for name, form in IN_THE_LOG.items() if name in metrics]
        if (eta_s := self._status.now.eta_s) and "train/loss" in metrics:
            steps = last_step(self.config.training) - self._state.global_step
            parts.append(f"{3600 * steps / eta_s:.0f} steps/h, {timedelta(seconds=round(eta_s))} left")
        if parts:
            self.logger.info(f"step {self._state.global_step}: {', '.join(parts)}")
        self._status.update()

    def draw(self, name: str, make: Callable[[], Image.Image]) -> None:
        """Make a picture on rank 0, which may take its time, and send it to the dashboard; all ranks call."""

        def draw() -> None:
            self.logger.info(f"step {self._state.global_step}: drawing {name}")
            with log_and_continue(self.logger, f"{name} at step {self._state.global_step}", Exception):
                self.log_image(name, make())

        with self._clock.pause():
            self._world.broadcast_from_rank0(draw)

    def log_image(self, name: str, image: Image.Image) -> None:
        """To the dashboard only; the caller keeps the file."""
        if self._dashboard is not None:
            self._dashboard.log_image(name, image, self._state.global_step)

    def draw_curves(self) -> None:
        """All metrics up to now as training_curves.png."""
        if self._tells:
            with self._clock.pause(), log_and_continue(self.logger, "training curves", Exception):
                save_training_curves(self._metrics.path, self.output_dir / "training_curves.png")

    def flush(self) -> None:
        """Write what a full disk has held up."""
        if self._tells:
            with log_and_continue(self.logger, "metrics"):
                self._metrics.flush()

    def finish(self, exit_code: int, preempted: bool = False) -> None:
        """End the dashboard's run, in a bounded time."""
        if self._dashboard is not None:
            self._dashboard.finish(exit_code, preempted)

    def _warn(self, title: str, text: str) -> None:
        if not self._tells:
            return
        self.logger.warning(f"warning: {title}: {text}")
        self._status.now.warning = f"step {self._state.global_step}: {title}: {text}"
        self._status.update()
        if self._dashboard is not None:
            self._dashboard.alert(title, text)
