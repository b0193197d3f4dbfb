"""What keeps a training run alive, behind one object: the script that holds it computes and updates, nothing else."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from utils.config import Config
from utils.config_checks import accumulation_steps
from utils.errors import TrainingError
from utils.faults import fault_point
from utils.files.lock import only_writer
from utils.files.weights import save_weights
from utils.ranks import ignored_launcher_settings, join_world
from utils.run.checkpoint import MODEL
from utils.run.compatibility import check_same_run, flatten
from utils.run.curves import save_training_curves
from utils.run.folder import code_facts, going_on, make_logger, prepare_run_folder
from utils.run.guard import StepGuard
from utils.run.manifest import Provenance, TrainingData
from utils.run.metrics_file import MetricsFile
from utils.run.resume import find_start, last_step, load_start, set_aside, starting_state
from utils.run.saver import CheckpointSaver
from utils.run.signals import StoppedWaitingError, StopSignals, stacks_of_a_hang
from utils.run.snapshot import Optimizers, Resumable, take_snapshot, weights_of
from utils.run.status import EXIT_PREEMPTED, StatusKeeper
from utils.run.tracking import Dashboard
from utils.run.trained_weights import FINAL_FILE

EXIT_STATUS = {"completed": 0, "preempted": EXIT_PREEMPTED}
D = TypeVar("D", bound=TrainingData)


class TrainingRun:
    """The life of a run, in the order in which a script goes through it:

    1. `with TrainingRun(config) as run`: all ranks are there and agree on config, code and versions, no other launch
       writes to the run folder, and the rules of `experiment.resume` have chosen what to start from: a verified
       checkpoint, weights alone, or nothing.
    2. `open_data`: rank 0 opens it first; all have the same, and it is that of the checkpoint.
    3. `begin`: modules and optimizers are loaded; only then does the run folder change. From here on a stop signal asks
       for a save, and status.json says `running`.
    4. `steps`: those that are left, until the last one or until a stop signal has reached any rank. In each of them
    5. `may_update`: losses and gradients are finite on all ranks, else none of them makes the update;
    6. `count_step`: the step is done: it can be logged and saved in the background (`log_due`, `log`, `save`...).
    7. `finish`: the last checkpoint is on disk, or the run has failed.
    8. At the end of the block status.json says `completed`, `preempted` or `failed`, with step and reason.

    Attributes:
        world: the processes of this launch.
        is_new: nothing to start from.
        micro_steps: micro-batches per step on each rank.
        global_batch_size: images per step.
        remaining: numbers of the steps that are left.
        samples_seen: images of the steps that are done.
        output_dir, logger, notices: the run folder, its log (silent on other ranks than 0), lines for its beginning.

    Raises:
        InputError, TrainingError: whatever keeps the run from starting or from going on, in one line.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.output_dir = config, Path(config.experiment.output_dir)
        self._metrics = MetricsFile(self.output_dir / "metrics.jsonl")
        self._dashboard: Dashboard | None = None  # rank 0 alone

    def __enter__(self) -> "TrainingRun":
        training, experiment = self.config.training, self.config.experiment
        with ExitStack() as exits:
            limits = training.launch_timeout, training.process_group_timeout
            self.world = exits.enter_context(join_world(*limits, self.output_dir))
            facts = code_facts()
            self.world.agree("config and code", flatten(asdict(self.config)) | facts)
            self._code = facts["code"]
            self.world.from_main(lambda: exits.enter_context(only_writer(self.output_dir, inside=True)))
            exits.push(lambda kind, *_: self._dashboard.finish(1) if kind and self._dashboard else None)
            self._status = StatusKeeper(self.output_dir, self.world, training.process_group_timeout)
            exits.push(self._status.note_end)
            self._start = self.world.from_main(lambda: find_start(self.output_dir, experiment.resume))
            self.micro_steps = accumulation_steps(training, self.world.size)
            self.global_batch_size = training.per_gpu_batch_size * self.micro_steps * self.world.size
            self._exits = exits.pop_all()
        return self

    @property
    def is_new(self) -> bool:
        return self._start.checkpoint is None

    @property
    def remaining(self) -> range:
        return range(self._state.global_step, last_step(self.config.training))

    @property
    def steps_done(self) -> int:
        return self._state.global_step

    @property
    def samples_seen(self) -> int:
        return self._state.samples_seen

    def open_data(self, open_it: Callable[[], D], tokenizer_sha256: str | None = None) -> D:
        """What `open_it` gives: on rank 0, which may convert and verify files, and then on the others.

        Args:
            tokenizer_sha256: of the tokenizer on whose codes a model is trained; the weights remember it.
        """
        data = self.world.main_first(open_it)
        self.world.agree("data", {"hash": data.fingerprint, "samples": len(data)})
        self._num_samples = len(data)
        self._provenance = Provenance(asdict(self.config), data.fingerprint, self._code, tokenizer_sha256)
        check = (self._start, self.config, self._provenance, self.global_batch_size)
        self.notices = self._start.notices + self.world.from_main(lambda: check_same_run(*check))
        return data

    def begin(self, modules: Mapping[str, nn.Module], optimizers: Optimizers, sharded: bool = False) -> None:
        """Load everything in place, on the devices where it is; then prepare the run folder.

        Args:
            modules: by name (of their files in a checkpoint), whose parameters and buffers are the state of the run;
                `model`, and perhaps `ema`, are what weights alone are loaded into.
            optimizers: by name, each with the module whose parameters it updates.
            sharded: the modules are under FSDP.
        """
        experiment, training = self.config.experiment, self.config.training
        self._resumable = Resumable(modules, optimizers, sharded)
        self.notices += load_start(self._start, self._resumable)
        self._state = starting_state(self._start, self.config, self.global_batch_size)
        self.notices += self._status.begin(self._state.global_step) + ignored_launcher_settings()
        if self.world.is_main:
            prepare_run_folder(self.config)
            set_aside(self._start)
            self._metrics.begin(self.steps_done)
            facts = {"processes": self.world.size, "global_batch_size": self.global_batch_size, "code": self._code}
            self._dashboard = Dashboard(self.config, self.output_dir, self.steps_done, facts)
            self.notices += filter(None, [self._dashboard.url, self._dashboard.sync_command])
        self.world.barrier()
        self.logger = make_logger(self.output_dir, self.world.is_main)
        for notice in self.notices:
            self.logger.info(notice)
        millions = sum(p.numel() for p in modules[MODEL].parameters()) / 1e6
        self.logger.info(
            f"{millions:.1f} M parameters, {self._num_samples} samples, {self.global_batch_size} per step on "
            f"{self.world.size} processes, steps {self.remaining.start} to {self.remaining.stop}"
        )
        saver = CheckpointSaver(experiment, self._provenance, self._start.checkpoint, self.logger)
        self._saver = self._exits.enter_context(saver)
        limits = self._state.nonfinite_steps, training.max_nonfinite_steps
        self._guard = StepGuard(self.world, *limits, self._exits.enter_context(StopSignals()), self._saver, self.logger)
        self._status.write()

    def steps(self) -> Iterator[int]:
        """The steps that are left, with a progress bar."""
        remaining = self.remaining
        options = {"initial": remaining.start, "total": remaining.stop, "disable": not self.world.is_main}
        self._timer, self._timed_from = time.perf_counter(), remaining.start
        hang = stacks_of_a_hang(self.config.training.process_group_timeout)
        with tqdm(remaining, **options) as self._progress, hang as rearm:
            for step in self._progress:
                rearm()
                fault_point("step", step)
                yield step
                if self._guard.stop:
                    return

    def may_update(self, losses_and_norm: Tensor) -> bool:
        """Whether these values (K,) are finite on all ranks. Counts what is skipped and hears of stop signals.

        Raises:
            TrainingError: too many steps in a row that are not finite, or too many failed saves.
        """
        return self._guard.allows_update(self._state.global_step, losses_and_norm)

    def count_step(self) -> None:
        self._state.global_step += 1
        self._state.samples_seen += self.global_batch_size
        self._state.nonfinite_steps = self._guard.nonfinite_steps
        self._status.now.step = self._state.global_step

    def stop_requested(self) -> bool:
        """A stop signal has reached this process: for what waits within a step."""
        return self._guard.signals.requested()

    def is_due(self, every: int) -> bool:
        """The number of steps that are done is a multiple of `every`."""
        return self.steps_done % every == 0

    @property
    def is_last(self) -> bool:
        return self._state.global_step == self.remaining.stop

    @property
    def log_due(self) -> bool:
        return self._state.global_step == 1 or self.is_due(self.config.experiment.log_every)

    @property
    def save_due(self) -> bool:
        return self.is_due(self.config.experiment.save_every) and not self.is_last and not self._guard.stop

    @property
    def grid_due(self) -> bool:
        return (self.is_due(self.config.experiment.generate_every) or self.is_last) and not self._guard.stop

    def log(self, metrics: dict[str, float]) -> None:
        """Write the metrics of the step that is done, with speed and number of skipped updates; rank 0 alone does."""
        if self._dashboard is None:
            return
        now, steps = time.perf_counter(), self.steps_done - self._timed_from
        metrics["samples/sec/gpu"] = steps * self.global_batch_size / self.world.size / (now - self._timer)
        metrics["nonfinite_steps"] = self._guard.nonfinite_steps
        self._timer, self._timed_from = now, self.steps_done
        self._metrics.append(self.steps_done, metrics)
        self._dashboard.log(metrics, self.steps_done)
        self._status.update()
        losses = {name.removeprefix("train/"): value for name, value in metrics.items() if name.endswith("loss")}
        self._progress.set_postfix({name: f"{value:.3f}" for name, value in losses.items()})

    def draw(self, name: str, make: Callable[[], Image.Image]) -> None:
        """Make a picture on rank 0, which may take its time, and send it to the dashboard."""

        def draw() -> None:
            with going_on(self.logger, f"{name} at step {self.steps_done}"):
                self.log_image(name, make())

        self.world.from_main(draw)

    def log_image(self, name: str, image: Image.Image) -> None:
        """Send a picture to the dashboard, on rank 0; the caller keeps the file."""
        if self._dashboard is not None:
            self._dashboard.log_image(name, image, self.steps_done)

    def save(self) -> None:
        """Copy the state to host memory and write it as a checkpoint while training goes on."""
        self._saver.wait()
        self.world.barrier()  # without a limit, which the save before this one may exceed
        if self.world.is_main:
            self._saver.start(self._state, take_snapshot(self._resumable))
        elif self._resumable.sharded:
            take_snapshot(self._resumable)  # all ranks send their slices to rank 0

    def finish(self) -> bool:
        """Save where the run stands and wait for it; draw the curves.

        Returns:
            The last step is done; False after a stop signal.

        Raises:
            TrainingError: the save failed.
        """
        done = self._state.global_step
        if self._start.checkpoint != str(self.output_dir / f"checkpoint-{done}"):
            self.save()
            self._saver.wait()
        if self.world.from_main(lambda: self._saver.failures_in_a_row > 0):
            raise TrainingError(f"step {done}: the save failed at the end; {self._saver.describe_last_good()}")
        self._status.end(self.is_last, self._guard.signals)
        if self.world.is_main:
            self._metrics.flush()
            if self.is_last:
                with going_on(self.logger, "training curves"):
                    save_training_curves(self.output_dir / "metrics.jsonl", self.output_dir / "training_curves.png")
        return self.is_last

    def export(self, name: str) -> None:
        """Write the weights of a module to `<output_dir>/model.safetensors`, the file that others sample from."""
        weights = weights_of(self._resumable.modules[name], self._resumable.sharded)
        if self.world.is_main:
            save_weights(weights, self.output_dir / FINAL_FILE, self.record())

    def record(self) -> dict[str, Any]:
        """What weights of this step remember."""
        return self._provenance.record(self.steps_done)

    @property
    def status(self) -> str:
        """running, completed, preempted or failed."""
        return self._status.now.status

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        stopped = isinstance(error, StoppedWaitingError) and self.world.size == 1  # several ranks cannot agree then
        if stopped:
            self.finish()  # the step that waited has changed nothing
        elif error is not None:
            self._exits.__exit__(kind, error, traceback)
            return False
        with self._exits:
            self.world.barrier()  # without a limit: rank 0 may still be writing
            self._status.write()
            if self._dashboard is not None:
                self._dashboard.finish(EXIT_STATUS[self.status], self.status == "preempted")
            self.logger.info(f"{self._status.now}: {self.output_dir}")
        return stopped
