"""The start of a training run, before there is a model: ranks, run folder, checkpoint, data."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from utils.config import Config, flat
from utils.config_checks import accumulation_steps
from utils.distributed import DistributedContext, init_distributed
from utils.launch_variables import ignored_launcher_settings
from utils.precision import deterministic, exact_attention_dropout, matmul_precision
from utils.run.failure import reason_of
from utils.run.manifest import Provenance, TrainingData, read_manifest
from utils.run.resume import Start, check_same_run, find_start, is_finished
from utils.run.run_environment import code_facts
from utils.run.status import note_failed_start, read_status_or_none

D = TypeVar("D", bound=TrainingData)


@dataclass
class Launch:
    """
    Attributes:
        start: what the run resumes from; verified.
        micro_steps: micro-batches per step on each rank.
        global_batch_size: images per step.
        code_hash: hash of the Python sources.
        lock_owner: process id of rank 0, which holds the lock of the run folder.
        notes: lines for the log, written when the run begins.
    """

    config: Config
    ctx: DistributedContext
    start: Start
    micro_steps: int
    global_batch_size: int
    code_hash: str
    lock_owner: int
    notes: list[str]

    @property
    def is_new(self) -> bool:
        """Whether there is no checkpoint to resume from."""
        return self.start.checkpoint is None

    def open_data(self, open_it: Callable[[], D], tokenizer_sha256: str | None = None) -> tuple[D, Provenance]:
        """Open the training data, on rank 0 first, which may convert files.

        Returns the data and their provenance for checkpoints. Raises InputError if the data differ between ranks or,
        with config and tokenizer, do not fit the resumed checkpoint.

        Args:
            tokenizer_sha256: hash of a generator's tokenizer.
        """
        data = self.ctx.rank0_first(open_it)
        self.ctx.assert_same_on_all_ranks("data", {"hash": data.fingerprint, "samples": len(data)})
        provenance = Provenance(
            config=asdict(self.config),
            data_hash=data.fingerprint,
            code_hash=self.code_hash,
            tokenizer_sha256=tokenizer_sha256,
            class_names=data.class_names,
        )
        self.notes += self.ctx.broadcast_from_rank0(
            check_same_run, self.start, self.config, provenance, self.global_batch_size
        )
        if is_finished(self.start, self.config):  # nothing is trained: the weights stay what they were made from
            provenance = read_manifest(Path(str(self.start.checkpoint))).provenance
        return data, provenance


@contextmanager
def launch(config: Config) -> Iterator[Launch]:
    """Meet the other ranks, lock the run folder, and find the checkpoint to resume from, by `experiment.resume`.

    Raises:
        InputError: ranks that differ in config, code or versions; a folder in use; no checkpoint where one is required.
        TrainingError: a rank that does not arrive.
    """
    training = config.training
    output_dir = Path(config.experiment.output_dir)
    with (
        deterministic(training.deterministic),
        init_distributed(training.launch_timeout, training.process_group_timeout, traces=output_dir) as ctx,
    ):
        facts = code_facts()
        ctx.assert_same_on_all_ranks("config and code", dict(flat(asdict(config))) | facts)
        with (
            ctx.locked(output_dir, inside=True),
            _failed_start_noted(output_dir, ctx),
            matmul_precision(training.enable_tf32),
            exact_attention_dropout(),
        ):
            start = ctx.broadcast_from_rank0(find_start, output_dir, config.experiment.resume)
            micro_steps = accumulation_steps(training, ctx.size)
            yield Launch(
                config=config,
                ctx=ctx,
                start=start,
                micro_steps=micro_steps,
                global_batch_size=training.per_gpu_batch_size * micro_steps * ctx.size,
                code_hash=facts["code"],
                lock_owner=ctx.broadcast_from_rank0(os.getpid),
                notes=[*start.notices, *ignored_launcher_settings()],
            )


@contextmanager
def _failed_start_noted(output_dir: Path, ctx: DistributedContext) -> Iterator[None]:
    """Correct status.json, which must not stay `running` or `preempted` if this start fails before its run has
    begun."""
    before = read_status_or_none(output_dir)
    try:
        yield
    except BaseException as error:
        if ctx.is_rank0 and read_status_or_none(output_dir) == before:
            note_failed_start(output_dir, reason_of(error))
        raise
