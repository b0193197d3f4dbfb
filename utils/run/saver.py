"""Writing checkpoints while training goes on."""

import logging
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from utils.run.checkpoint import prune_checkpoints, write_checkpoint
from utils.run.manifest import Provenance, TrainingState
from utils.run.snapshot import HostBuffers, Resumable, Snapshot, take_snapshot
from utils.schema import ExperimentConfig


class CheckpointSaver:
    """Writes snapshots in a thread, one at a time. A failure is one line in the log, and training goes on.

    Only the main process writes; that needs host memory for a copy of the whole state, kept for the next one.

    Attributes:
        last_good: the newest checkpoint that was written or that the run started from.
        failures_in_a_row: failed saves since the last good one.
    """

    def __init__(
        self, experiment: ExperimentConfig, provenance: Provenance, last_good: str | None, logger: logging.Logger
    ) -> None:
        self.experiment, self.provenance, self.logger = experiment, provenance, logger
        self.output_dir = Path(experiment.output_dir)
        self.limit, self.last_good, self.failures_in_a_row = experiment.max_save_failures, last_good, 0
        self._thread: threading.Thread | None = None
        self._buffers = HostBuffers()

    def __enter__(self) -> "CheckpointSaver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait, for it writes in a folder whose lock is about to be left; a second Ctrl-C does not."""
        if not isinstance(error, KeyboardInterrupt):
            self.wait()

    @property
    def gave_up(self) -> bool:
        return self.failures_in_a_row >= self.limit

    def start(self, state: TrainingState, resumable: Resumable, is_rank0: bool) -> None:
        """Copy everything and begin to write it, after the save before this one has ended, whose memory is used."""
        self.wait()
        snapshot = take_snapshot(resumable, self._buffers)
        if not is_rank0:
            return
        self._thread = threading.Thread(target=self._write, args=(replace(state), snapshot))
        self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def describe_last_good(self) -> str:
        self.wait()
        return f"the last good checkpoint is {self.last_good}" if self.last_good else "there is no checkpoint"

    def _write(self, state: TrainingState, snapshot: Snapshot) -> None:
        try:
            self.last_good = str(write_checkpoint(self.output_dir, state, self.provenance, snapshot))
        except Exception as error:  # full disk: OSError or torch's RuntimeError; whatever it is, all ranks must learn
            self.failures_in_a_row += 1
            free = shutil.disk_usage(self.output_dir).free
            self.logger.error(
                f"checkpoint-{state.global_step} was not written (failure {self.failures_in_a_row} of "
                f"{self.limit} in a row): {str(error).splitlines()[0]}; needed "
                f"{snapshot.num_bytes() / 1e9:.3f} GB, free {free / 1e9:.3f} GB"
            )
            return
        self.failures_in_a_row = 0
        try:
            prune_checkpoints(self.output_dir, self.experiment.keep_last, self.experiment.keep_every)
        except (OSError, RuntimeError) as error:
            self.logger.warning(f"an old checkpoint could not be deleted: {error}")
