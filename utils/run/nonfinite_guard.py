"""What all ranks must know before the update of a step: one all-reduce of three numbers."""

import logging

import torch
from torch import Tensor

from utils.distributed import DistributedContext
from utils.errors import TrainingError
from utils.run.saver import CheckpointSaver
from utils.run.signals import StopSignals


class NonFiniteGuard:
    """Decides on every rank alike whether to update, to go on or to end.

    Args:
        nonfinite_steps: skipped updates before this start of the run.
        limit: `training.max_nonfinite_steps`.

    Attributes:
        stop: a stop signal has reached any rank; end after this step.
        nonfinite_steps: skipped updates of the whole run.
    """

    def __init__(
        self,
        ctx: DistributedContext,
        nonfinite_steps: int,
        limit: int,
        signals: StopSignals,
        saver: CheckpointSaver,
        logger: logging.Logger,
    ) -> None:
        self.ctx, self.nonfinite_steps, self.limit, self.in_a_row = ctx, nonfinite_steps, limit, 0
        self.signals, self.saver, self.logger = signals, saver, logger
        self.stop = False

    def update_is_finite(self, step: int, loss_and_norm: Tensor) -> bool:
        """Join the flags of all ranks. Waits for the device, once per step. A fused optimizer could skip an update
        without that (`found_inf`), but EMA, means, counts, saves and the end of the run depend on the answer, too.

        Args:
            loss_and_norm: (K,) losses and gradient norm of this rank; the update is skipped unless all are finite.

        Raises:
            TrainingError: too many steps in a row that are not finite, or too many failed checkpoints.
        """
        unusable = ~torch.isfinite(loss_and_norm).all()
        # Filled on the device: assigned to an element, a number would be copied there, with a wait of its own.
        of_host = [torch.full_like(unusable, flag) for flag in (self.signals.requested(), self.saver.gave_up)]
        flags = torch.stack([*of_host, unusable]).float()
        self.stop, save_failed, nonfinite = (flag > 0 for flag in self.ctx.all_reduce_max(flags).tolist())
        if save_failed:
            raise TrainingError(
                f"step {step}: checkpoints failed {self.saver.limit} times in a row (experiment.max_save_failures); "
                f"{self._last_good()}"
            )
        if not nonfinite:
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        self.nonfinite_steps += 1
        self.logger.warning(f"step {step}: loss or gradient not finite, update skipped ({self.in_a_row} in a row)")
        if self.in_a_row >= self.limit:
            raise TrainingError(
                f"step {step}: loss or gradient not finite for {self.in_a_row} steps in a row "
                f"(training.max_nonfinite_steps={self.limit}); {self._last_good()}"
            )
        return False

    def _last_good(self) -> str:
        return self.saver.describe_last_good() if self.ctx.is_rank0 else "rank 0 names the last good checkpoint"
