"""One launch of a training run: checkpoints, logging, signals and status around the steps of a script."""

import gc
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from utils.distributed import DistributedContext
from utils.errors import TrainingError
from utils.faults import fault_point
from utils.files.lock import still_held
from utils.files.weights import save_weights
from utils.run.checkpoint import CheckpointSaver, Optimizers, Resumable, weights_of
from utils.run.estimates import TrainingCost, memory_estimate
from utils.run.failure import failures_recorded
from utils.run.gc_control import manual_gc
from utils.run.launch import Launch
from utils.run.manifest import Provenance
from utils.run.metrics import DataIterator, Metric, TrainingMetrics
from utils.run.profiling import profiled
from utils.run.reporter import Reporter
from utils.run.resume import back_up, last_step, load_start, starting_state
from utils.run.run_environment import log_and_continue, prepare_run_folder
from utils.run.signals import StoppedWaitingError, StopSignals, stacks_of_a_hang
from utils.run.status import EXIT_STATUS, Status, StatusFile, read_status_or_none
from utils.run.step_triggers import StepTriggers
from utils.run.weights_path import FINAL_FILE

B = TypeVar("B")
GC_EVERY = 100  # steps
ROOM_FOR = 2  # checkpoints; with less disk space there is a warning


class TrainingRun:
    """All methods are collective, except `note`, `warn`, `stop` and `stop_requested`, which any rank may call.

    Args:
        num_samples: size of the training data.
        modules: what checkpoints hold, by file name: parameters and buffers. `model` and, if there is one, `ema` can
            also be loaded from weights without a checkpoint.
        optimizers: by file name, each with the module that it updates.
        memory_hint: what to change when memory runs out, for the message.
        cost: FLOPs and activation bytes of an image; None: unknown.

    Attributes:
        state: steps and samples done.
        triggers: what to do after a step.
        logger: writes to log.txt and the console, on rank 0.

    Raises:
        InputError: a checkpoint that does not fit the modules, or that is beyond the last step.
    """

    def __init__(
        self,
        launched: Launch,
        provenance: Provenance,
        *,
        num_samples: int,
        modules: Mapping[str, nn.Module],
        optimizers: Optimizers,
        memory_hint: str,
        cost: TrainingCost | None = None,
    ) -> None:
        config, ctx, start = launched.config, launched.ctx, launched.start
        self.config = config
        self.ctx = ctx
        self.output_dir = Path(config.experiment.output_dir)
        self._launched = launched
        self._provenance = provenance
        self._num_samples = num_samples
        self._memory_hint = memory_hint
        self._resumable = Resumable(modules, optimizers)
        self._notes = [*launched.notes, *load_start(start, self._resumable)]
        self.state = starting_state(start, config, launched.global_batch_size)
        self.triggers = StepTriggers(config.experiment, self.state, last_step(config.training))
        self._memory = memory_estimate(
            modules,
            optimizers=[optimizer for _, optimizer in optimizers.values()],
            shards=ctx.size if self._resumable.is_sharded else 1,
            activation_bytes=cost.activation_bytes * config.training.per_gpu_batch_size if cost else None,
            micro_steps=launched.micro_steps,
        )
        self._metrics = TrainingMetrics(
            ctx,
            launched.global_batch_size,
            skipped_images=self.state.skipped_images,
            trained_s=self.state.trained_s,
            flops_per_image=cost.flops if cost else None,
        )
        self._status = StatusFile(
            self.output_dir,
            ctx,
            Status("running", self.state.global_step, trained_s=self.state.trained_s, last_checkpoint=start.checkpoint),
            lock_owner=launched.lock_owner,
        )
        self._reporter = Reporter(config, self._status, ctx.is_rank0)
        self.logger = self._reporter.logger
        self._saver = CheckpointSaver(config.experiment, provenance, start.checkpoint, self.logger)
        self._signals = StopSignals()
        self._stop_reason: str | None = None
        self._folder_is_lost = False  # known to rank 0
        self._nonfinite_in_a_row = 0

    @property
    def remaining(self) -> range:
        """Numbers of the steps to do."""
        return range(self.state.global_step, self.triggers.last_step)

    @property
    def status(self) -> str:
        """running, completed, preempted or failed"""
        return self._status.now.status

    @contextmanager
    def begin(self) -> Iterator[None]:
        """The run: write to the run folder, catch stop signals, and at the end record in status.json how it ended.

        Raises:
            TrainingError: the run cannot continue; also instead of errors about memory and lost ranks.
        """
        timeout = self.config.training.process_group_timeout
        try:
            with failures_recorded(self._status, memory_hint=self._memory_hint, group_timeout_s=timeout):
                self._write_beginning()
                with self._saver, self._signals, manual_gc():
                    try:
                        yield
                    except StoppedWaitingError:
                        if self.ctx.size > 1:  # the other ranks cannot know
                            raise
                        self.finish()  # the interrupted step made no update
                    self.ctx.barrier()  # without a limit: rank 0 may still be writing
                    self._status.write()
                    self.note(f"{self._status.now}: {self.output_dir}")
        finally:
            self._reporter.finish(EXIT_STATUS.get(self.status, 1), preempted=self.status == "preempted")

    def _write_beginning(self) -> None:
        facts = {
            "processes": self.ctx.size,
            "global_batch_size": self._launched.global_batch_size,
            "samples": self._num_samples,
            "parameters": self._memory.parameters,
        }
        if self.ctx.is_rank0:
            before = read_status_or_none(self.output_dir)
            self._status.write()
            prepare_run_folder(self.config)
            back_up(self._launched.start)
            self._reporter.begin(self.state.global_step, facts | self.record())
            if before is not None and before.status == "running":
                self.note(f"the previous launch was killed at step {before.step} or later")
            for line in self._notes:
                self.note(line)
            self.note(
                f"{self._num_samples} samples, {self._launched.global_batch_size} per step on {self.ctx.size} "
                f"processes, steps {self.state.global_step} to {self.triggers.last_step}"
            )
            self.note(str(self._memory))
            self._warn_of_full_disk()
            self._status.write()
        self.ctx.barrier()  # without a limit: wandb may take a while to answer

    def steps(self) -> Iterator[int]:
        """The steps to do, with a progress bar on a terminal, until the last one or a stop."""
        remaining = self.remaining
        bar = tqdm(remaining, initial=remaining.start, total=remaining.stop, disable=not self.ctx.is_rank0 or None)
        log_above_bar = nullcontext() if bar.disable else logging_redirect_tqdm([self.logger])
        with bar, log_above_bar, stacks_of_a_hang(self.config.training.process_group_timeout) as postpone:
            gc.collect()
            gc.freeze()
            self._metrics.start()
            for step in profiled(bar, self.config, self.ctx, self.logger):
                postpone()
                if step % GC_EVERY == 0:
                    gc.collect()
                fault_point("step", step)
                yield step
                if self.triggers.interrupted or self.triggers.is_last:
                    return

    def next_batch(self, batches: DataIterator[B]) -> B:
        """The next batch; the wait is logged as perf/data_wait_pct."""
        return self._metrics.next_batch(batches)

    def update_is_finite(self, values: Sequence[Tensor]) -> bool:
        """Whether losses and gradient norm of this step (scalars) are finite on all ranks; if not, no rank may update.

        The step's only synchronization with the device. A fused optimizer could skip an update without it
        (`found_inf`), but EMA, metrics and counts depend on the answer too. Ranks also agree here on
        whether to stop after this step.

        Raises:
            TrainingError: too many steps in a row that are not finite, or too many failed saves.
        """
        is_nonfinite, interrupted, stop, save_failed = flags_of_any_rank(
            self.ctx,
            on_device=~torch.isfinite(torch.stack(list(values))).all(),
            on_host=[
                self._signals.requested() or self._folder_is_lost,
                self._stop_reason is not None,
                self._saver.gave_up,
            ],
        )
        self.triggers.interrupted = interrupted
        if stop:
            self.triggers.last_step = self.state.global_step + 1
        if save_failed:
            limit = self.config.experiment.max_save_failures
            self._fail(f"checkpoints failed {limit} times in a row (experiment.max_save_failures)")
        if is_nonfinite:
            self._skip_update()
        else:
            self._nonfinite_in_a_row = 0
        return not is_nonfinite

    def _skip_update(self) -> None:
        self.state.nonfinite_steps += 1
        self._nonfinite_in_a_row += 1
        in_a_row, limit = self._nonfinite_in_a_row, self.config.training.max_nonfinite_steps
        step = self.state.global_step
        self.logger.warning(f"step {step}: loss or gradient not finite, update skipped ({in_a_row} in a row)")
        if in_a_row >= limit:
            self._fail(
                f"loss or gradient not finite for {in_a_row} steps in a row (training.max_nonfinite_steps={limit})"
            )
        self.warn("first skipped update", "a loss or gradient was not finite")

    def _fail(self, reason: str) -> None:
        """End the run, on all ranks, after a log line of the steps that led there."""
        if self._metrics.means.has_steps:
            self.log_interval({})
        last_good = self._saver.describe_last_good() if self.ctx.is_rank0 else "rank 0 names the last good checkpoint"
        raise TrainingError(f"step {self.state.global_step}: {reason}; {last_good}")

    def add_metrics(self, micro_batches: Sequence[Mapping[str, Metric]], grad_norm: Tensor) -> None:
        """Add the metrics of a finite step, by name in the log, to the interval means; `grad_norm` before clipping."""
        self._metrics.means.add(micro_batches, grad_norm)

    def end_step(self) -> None:
        """The step is done, with or without an update."""
        self._metrics.end_step()
        self.state.global_step += 1
        self.state.samples_seen += self._launched.global_batch_size
        self._status.now.step = self.state.global_step

    def log_interval(self, values: dict[str, float]) -> None:
        """Log the means of the steps since the last line, their speed, and `values` of the last step."""
        metrics = self._metrics.log_line() | values
        metrics["train/nonfinite_steps"] = self.state.nonfinite_steps
        self._update_progress()
        self._watch_folder()
        self.log(metrics)

    def _watch_folder(self) -> None:
        """If the run folder was deleted or moved, the run saves its state and ends: without its lock, a second launch
        could write to the folder too."""
        if self.ctx.is_rank0 and not still_held(self.output_dir):
            self._folder_is_lost = True

    def log(self, metrics: dict[str, float]) -> None:
        """Log further metrics of the state after the last step."""
        self._reporter.log(self.state.global_step, metrics, steps_left=len(self.remaining))

    def note(self, line: str) -> None:
        """Write a line to the log, on rank 0."""
        self.logger.info(line)

    def warn(self, title: str, text: str) -> None:
        """Warn in log, status.json and wandb, on rank 0, once for each title (less than 64 characters)."""
        self._reporter.warn(self.state.global_step, title, text)

    def pause(self) -> AbstractContextManager[None]:
        """Work between two steps: excluded from the step time, logged as perf/pause_s."""
        return self._metrics.pause()

    def draw(self, name: str, make: Callable[[], Image.Image]) -> None:
        """Make a picture on rank 0, which may fail, and send it to wandb. The other ranks wait without a limit."""
        with self.pause():
            self._reporter.draw(self.state.global_step, name, make)
            self.ctx.barrier()

    def log_image(self, name: str, image: Image.Image) -> None:
        """Send a picture to wandb."""
        self._reporter.log_image(self.state.global_step, name, image)

    def draw_curves(self) -> None:
        """All metrics so far, as training_curves.png."""
        with self.pause():
            self._reporter.draw_curves()

    def stop_requested(self) -> bool:
        """A stop signal has reached this process; for code that blocks within a step."""
        return self._signals.requested()

    def stop(self, reason: str) -> None:
        """End the run as completed: the next step is the last one, on all ranks. It is logged, saved and exported like
        the last step of any run. Any rank may call this."""
        self._stop_reason = reason

    def save(self) -> None:
        """Copy the state to host memory; it is written as a checkpoint while training continues."""
        with self.pause():
            self._saver.wait()
            self.ctx.barrier()  # without a limit, which the save before this one may exceed
            self.state.skipped_images = self._metrics.skipped_images()
            self.state.trained_s = self._metrics.trained_s
            self._watch_folder()
            if self.ctx.is_rank0:
                self._warn_of_full_disk()
            if self.ctx.is_rank0 or self._resumable.is_sharded:  # then all ranks send their shards
                self._saver.start(self.state, self._resumable, self.ctx.is_rank0)

    def keep_weights(self, name: str) -> None:
        """Write the weights of a module to `<output_dir>/weights/<step>.safetensors`; nothing deletes them."""
        step = self.state.global_step
        with self.pause():
            with log_and_continue(self.logger, f"weights of step {step}"):
                self.export(name, f"weights/{step:07d}.safetensors")
            self.ctx.barrier()  # without a limit, which the writing may exceed

    def export(self, name: str, file: str = FINAL_FILE) -> None:
        """Write the weights of a module to a file in the run folder, for sampling."""
        weights = weights_of(self._resumable.modules[name])
        if self.ctx.is_rank0:
            path = self.output_dir / file
            path.parent.mkdir(exist_ok=True)
            save_weights(weights, path, self.record())

    def record(self) -> dict[str, Any]:
        """The provenance of the weights after the last step."""
        return self._provenance.record(self.state.global_step)

    def finish(self) -> bool:
        """Save the last checkpoint and wait for it.

        Returns:
            The run is complete; False after a stop signal.

        Raises:
            TrainingError: the save failed, or the run folder was deleted during training.
        """
        step = self.state.global_step
        if self._launched.start.checkpoint != str(self.output_dir / f"checkpoint-{step}"):
            self.save()
            self._saver.wait()
        failed = self.ctx.broadcast_from_rank0(lambda: self._saver.failures_in_a_row > 0)
        if failed:
            raise TrainingError(f"step {step}: the save failed at the end; {self._saver.describe_last_good()}")
        if self.ctx.broadcast_from_rank0(lambda: self._folder_is_lost):
            if self.ctx.is_rank0:
                prepare_run_folder(self.config)
            if not self.triggers.is_last:
                raise TrainingError(
                    f"step {step}: {self.output_dir} was deleted or moved during training; it now holds "
                    f"checkpoint-{step}, from which the same command resumes"
                )
        status = self._status.now
        if self.triggers.is_last:
            status.status = "completed"
            is_early = self.triggers.last_step < last_step(self.config.training)
            status.reason = (self._stop_reason or "another rank has stopped the run") if is_early else ""
        else:
            status.status = "preempted"
            status.reason = self._signals.received or "a signal to another rank"
        self._update_progress()
        return self.triggers.is_last

    def _update_progress(self) -> None:
        status = self._status.now
        status.trained_s = round(self._metrics.trained_s, 1)
        status.last_checkpoint = self._saver.last_good
        seconds_per_step = self._metrics.seconds_per_step
        if seconds_per_step is not None:
            status.eta_s = round(seconds_per_step * len(self.remaining), 1)

    def _warn_of_full_disk(self) -> None:
        needed = self._memory.checkpoint_bytes
        with suppress(OSError):  # a save will report it
            free = shutil.disk_usage(self.output_dir).free
            if free < ROOM_FOR * needed:
                self.warn("disk", f"{free / 1e9:.3g} GB free, a checkpoint needs {needed / 1e9:.3g}")


def flags_of_any_rank(ctx: DistributedContext, on_device: Tensor, on_host: Sequence[bool]) -> list[bool]:
    """For each flag, whether it is set on any rank, in one reduction and one wait for the device."""
    # Filled on the device: a host value that is copied there would be another wait.
    flags = torch.stack([on_device, *(torch.full_like(on_device, flag) for flag in on_host)])
    return [flag > 0 for flag in ctx.all_reduce_max(flags.float()).tolist()]
