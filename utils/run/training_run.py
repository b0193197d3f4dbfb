"""What keeps a training run alive, behind one object: the script that holds it computes and updates, nothing else."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from utils.config import Config, flat
from utils.config_checks import accumulation_steps
from utils.distributed import ignored_launcher_settings, init_distributed
from utils.errors import TrainingError
from utils.faults import fault_point
from utils.files.weights import save_weights
from utils.precision import deterministic, matmul_precision
from utils.run.gc_control import gc_between_steps
from utils.run.manifest import Provenance, TrainingData
from utils.run.measurements import Measurements
from utils.run.memory_estimate import MemoryEstimate
from utils.run.nonfinite_guard import NonFiniteGuard
from utils.run.profiling import profiled
from utils.run.reporter import Reporter
from utils.run.resume import back_up, check_same_run, find_start, last_step, load_start, starting_state
from utils.run.run_environment import code_facts, log_and_continue, prepare_run_folder
from utils.run.saver import CheckpointSaver
from utils.run.signals import StoppedWaitingError, StopSignals, stacks_of_a_hang
from utils.run.snapshot import Optimizers, Resumable, weights_of
from utils.run.status import EXIT_PREEMPTED, StatusKeeper
from utils.run.step_triggers import StepTriggers
from utils.run.weights_path import FINAL_FILE

EXIT_STATUS = {"completed": 0, "preempted": EXIT_PREEMPTED}
D = TypeVar("D", bound=TrainingData)


class TrainingRun:
    """The life of a run, in the order in which a script goes through it:

    1. `with TrainingRun(...) as run`: all ranks are there and agree on config, code and versions, no other launch
       writes to the run folder, and the rules of `experiment.resume` have chosen what to start from: a verified
       checkpoint, weights alone, or nothing.
    2. `open_data`: rank 0 opens it first; all have the same, and it is that of the checkpoint.
    3. `begin`: modules and optimizers are loaded; only then does the run folder change. From here on a stop signal asks
       for a save, and status.json says `running`.
    4. `steps`: those that are left, until the last one or until a stop signal has reached any rank. In each of them
    5. `update_is_finite`: losses and gradients are finite on all ranks, else none of them makes the update;
    6. `count_step`: the step is done. What is then `triggers`: the means of the steps since the last line in the log
       (`log_interval`), a save in the background (`save`), weights alone (`keep_weights`).
    7. `finish`: the last checkpoint is on disk, or the run has failed.
    8. At the end of the block status.json says `completed`, `preempted` or `failed`, with step and reason.

    Args:
        saving_memory: what to change when memory runs out, for the message.

    Attributes:
        world: the processes of this launch.
        is_new: nothing to start from.
        micro_steps: micro-batches per step on each rank.
        global_batch_size: images per step.
        due: what is to be done after a step.
        measured: what the steps are measured by; `measured.clock.pause` is for what takes time between them.
        reporter: tells all who listen; silent on other ranks than 0, as `logger` is.
        remaining: numbers of the steps that are left.
        state: where the run stands.
        output_dir, logger: the run folder and its log.
        notices: lines for the log, written when the run begins.

    Raises:
        InputError, TrainingError: whatever keeps the run from starting or from going on, in one line.
    """

    def __init__(self, config: Config, saving_memory: str) -> None:
        self.config, self.output_dir = config, Path(config.experiment.output_dir)
        self._saving_memory = saving_memory

    def __enter__(self) -> "TrainingRun":
        training, experiment = self.config.training, self.config.experiment
        with ExitStack() as exits:
            exits.enter_context(deterministic(training.deterministic))
            limits = training.launch_timeout, training.process_group_timeout
            self.ctx = exits.enter_context(init_distributed(*limits, self.output_dir))
            facts = code_facts()
            self.ctx.assert_same_on_all_ranks("config and code", dict(flat(asdict(self.config))) | facts)
            self._code = facts["code"]
            exits.enter_context(self.ctx.locked(self.output_dir, inside=True))
            self._status = StatusKeeper(self.output_dir, self.ctx, limits[1], self._saving_memory)
            exits.callback(self._end_reports)
            exits.push(self._status.note_end)
            exits.enter_context(matmul_precision(training.enable_tf32))
            self._start = self.ctx.broadcast_from_rank0(lambda: find_start(self.output_dir, experiment.resume))
            self.micro_steps = accumulation_steps(training, self.ctx.size)
            self.global_batch_size = training.per_gpu_batch_size * self.micro_steps * self.ctx.size
            self._exits = exits.pop_all()
        return self

    @property
    def is_new(self) -> bool:
        return self._start.checkpoint is None

    @property
    def remaining(self) -> range:
        return range(self.state.global_step, last_step(self.config.training))

    def open_data(self, open_it: Callable[[], D], tokenizer_sha256: str | None = None) -> D:
        """What `open_it` gives: on rank 0, which may convert and verify files, and then on the others.

        Args:
            tokenizer_sha256: of the tokenizer on whose codes a model is trained; the weights remember it.
        """
        data = self.ctx.rank0_first(open_it)
        self.ctx.assert_same_on_all_ranks("data", {"hash": data.fingerprint, "samples": len(data)})
        self._facts = {"processes": self.ctx.size, "global_batch_size": self.global_batch_size, "samples": len(data)}
        self._provenance = Provenance(asdict(self.config), data.fingerprint, self._code, tokenizer_sha256)
        check = (self._start, self.config, self._provenance, self.global_batch_size)
        self.notices = [*self._start.notices, *self.ctx.broadcast_from_rank0(lambda: check_same_run(*check))]
        return data

    def begin(
        self,
        modules: Mapping[str, nn.Module],
        optimizers: Optimizers,
        sharded: bool = False,
        flops_per_image: float | None = None,
        activation_bytes: float | None = None,
    ) -> None:
        """Load everything in place, on the devices where it is; then prepare the run folder.

        Args:
            modules: by name (of their files in a checkpoint), whose parameters and buffers are the state of the run;
                `model`, and perhaps `ema`, are what weights alone are loaded into.
            optimizers: by name, each with the module whose parameters it updates.
            sharded: the modules are under FSDP.
            flops_per_image: of forward and backward pass; None: not told.
            activation_bytes: of an image, estimated; None: not told.
        """
        experiment, training = self.config.experiment, self.config.training
        self._resumable = Resumable(modules, optimizers, sharded)
        self.notices += load_start(self._start, self._resumable)
        self.state = starting_state(self._start, self.config, self.global_batch_size)
        self.notices += self._status.begin(self.state.global_step) + ignored_launcher_settings()
        self._status.progress(self.state.trained_s, self._start.checkpoint)
        if self.ctx.is_rank0:
            prepare_run_folder(self.config)
            back_up(self._start)
        of_micro_batch = activation_bytes and activation_bytes * training.per_gpu_batch_size
        plan = MemoryEstimate.of(modules, optimizers, self.ctx.size if sharded else 1, of_micro_batch, self.micro_steps)
        so_far = self.state.skipped_images, self.state.trained_s
        self.measured = Measurements(self.ctx, self.global_batch_size, *so_far, flops_per_image)
        self.reporter = Reporter(self.config, self.ctx, self._status, self.state, plan, self.measured.clock)
        self.logger = self.reporter.logger
        self.reporter.begin(self._facts | self.record(), self.notices)
        self.ctx.barrier()  # without a limit: the dashboard of rank 0 may take a while to answer
        saver = CheckpointSaver(experiment, self._provenance, self._start.checkpoint, self.logger)
        self._saver = self._exits.enter_context(saver)
        limits = self.state.nonfinite_steps, training.max_nonfinite_steps
        signals = self._exits.enter_context(StopSignals())
        self._guard = NonFiniteGuard(self.ctx, *limits, signals, self._saver, self.logger)
        self.triggers = StepTriggers(experiment, self.state, self.remaining.stop, self._guard)
        self._status.write()

    def steps(self) -> Iterator[int]:
        """The steps that are left, with a progress bar on a terminal."""
        remaining = self.remaining
        bar = tqdm(remaining, initial=remaining.start, total=remaining.stop, disable=not self.ctx.is_rank0 or None)
        collect = self._exits.enter_context(gc_between_steps())
        hang = stacks_of_a_hang(self.config.training.process_group_timeout)
        with bar, hang as rearm, nullcontext() if bar.disable else logging_redirect_tqdm([self.logger]):
            self.measured.clock.start()
            for step in profiled(bar, self.config, self.ctx, self.logger):
                rearm()
                collect(step)
                fault_point("step", step)
                yield step
                if self._guard.stop:
                    return

    def update_is_finite(self, losses_and_norm: Tensor) -> bool:
        """Whether these values (K,) are finite on all ranks. Counts what is skipped and hears of stop signals.

        Raises:
            TrainingError: too many steps in a row that are not finite, or too many failed saves.
        """
        try:
            allowed = self._guard.update_is_finite(self.state.global_step, losses_and_norm)
        except TrainingError:  # on all ranks
            if self.measured.has_steps:  # what led there
                self.log_interval({})
            raise
        if self._guard.nonfinite_steps == 1 and not allowed:
            self.reporter.alerts.warn("first skipped update", "a loss or gradient was not finite")
        return allowed

    def count_step(self) -> None:
        self.measured.clock.step_done()
        self.state.global_step += 1
        self.state.samples_seen += self.global_batch_size
        self.state.nonfinite_steps = self._guard.nonfinite_steps
        self._status.now.step = self.state.global_step

    def stop_requested(self) -> bool:
        """A stop signal has reached this process: for what waits within a step."""
        return self._guard.signals.requested()

    def log_interval(self, values: dict[str, float]) -> None:
        """The means of the steps since the last line of the log, with their speed; all ranks call.

        Args:
            values: of the step that is done.
        """
        metrics = self.measured.take() | values
        metrics["train/nonfinite_steps"] = self._guard.nonfinite_steps
        self._update_status()
        self.reporter.log(metrics)
        self.reporter.alerts.examine(metrics)

    def _update_status(self) -> None:
        clock = self.measured.clock
        self._status.progress(clock.trained_s, self._saver.last_good, clock.seconds_per_step, len(self.remaining))

    def save(self) -> None:
        """Copy the state to host memory and write it as a checkpoint while training goes on."""
        with self.measured.clock.pause():
            self._saver.wait()
            self.ctx.barrier()  # without a limit, which the save before this one may exceed
            self.state.skipped_images = self.measured.count_skipped()
            self.state.trained_s = self.measured.clock.trained_s
            if self.ctx.is_rank0:
                self.reporter.check_disk()
            if self.ctx.is_rank0 or self._resumable.sharded:  # then all ranks send their slices to rank 0
                self._saver.start(self.state, self._resumable, self.ctx.is_rank0)

    def finish(self) -> bool:
        """Save where the run stands and wait for it.

        Returns:
            The last step is done; False after a stop signal.

        Raises:
            TrainingError: the save failed.
        """
        done = self.state.global_step
        if self._start.checkpoint != str(self.output_dir / f"checkpoint-{done}"):
            self.save()
            self._saver.wait()
        failed = self.ctx.broadcast_from_rank0(lambda: self._saver.failures_in_a_row > 0)
        if failed:
            raise TrainingError(f"step {done}: the save failed at the end; {self._saver.describe_last_good()}")
        self._status.end(self.triggers.is_last, self._guard.signals)
        self._update_status()
        self.reporter.flush()
        return self.triggers.is_last

    def keep_weights(self, name: str) -> None:
        """Write the weights of a module to `<output_dir>/weights/<step>.safetensors`; nothing deletes them."""
        with self.measured.clock.pause():
            with log_and_continue(self.logger, f"weights of step {self.state.global_step}"):
                self.export(name, f"weights/{self.state.global_step:07d}.safetensors")
            self.ctx.barrier()  # without a limit, which the writing may exceed

    def export(self, name: str, file: str = FINAL_FILE) -> None:
        """Write the weights of a module to a file in the run folder, for sampling; rank 0 does."""
        weights = weights_of(self._resumable.modules[name], self._resumable.sharded)
        if self.ctx.is_rank0:
            path = self.output_dir / file
            path.parent.mkdir(exist_ok=True)
            save_weights(weights, path, self.record())

    def record(self) -> dict[str, Any]:
        """What weights of this step remember."""
        return self._provenance.record(self.state.global_step)

    @property
    def status(self) -> str:  # running, completed, preempted or failed
        return self._status.now.status

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        stopped = isinstance(error, StoppedWaitingError) and self.ctx.size == 1  # several ranks cannot agree then
        if stopped:
            self.finish()  # the step that waited has changed nothing
        elif error is not None:
            self._exits.__exit__(kind, error, traceback)
            return False
        with self._exits:
            self.ctx.barrier()  # without a limit: rank 0 may still be writing
            self._status.write()
            self.logger.info(f"{self._status.now}: {self.output_dir}")
        return stopped

    def _end_reports(self) -> None:
        if hasattr(self, "reporter"):  # the run has begun
            self.reporter.finish(EXIT_STATUS.get(self.status, 1), preempted=self.status == "preempted")
