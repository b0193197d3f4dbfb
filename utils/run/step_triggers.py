"""Triggers of the work after a step."""

from utils.run.manifest import TrainingState
from utils.schema import ExperimentConfig


class StepTriggers:
    """
    Args:
        state: state of the run; its step counts up.

    Attributes:
        last_step: number of steps after which the run is complete.
        interrupted: a stop signal has reached some rank; the run ends after this step.
    """

    def __init__(self, experiment: ExperimentConfig, state: TrainingState, last_step: int) -> None:
        self._experiment = experiment
        self._state = state
        self.last_step = last_step
        self.interrupted = False

    def every(self, steps: int) -> bool:
        """Whether the number of steps done is a multiple of `steps`; never for 0."""
        return steps > 0 and self._state.global_step % steps == 0

    @property
    def is_last(self) -> bool:
        return self._state.global_step >= self.last_step

    @property
    def log(self) -> bool:
        is_first = self._state.global_step == 1
        return self.every(self._experiment.log_every) or is_first or self.is_last or self.interrupted

    @property
    def save(self) -> bool:
        """Whether to save; not at the end, when `TrainingRun.finish` saves."""
        return self.every(self._experiment.save_every) and not self.is_last and not self.interrupted

    @property
    def weights(self) -> bool:
        return self.every(self._experiment.save_weights_every)

    @property
    def validation(self) -> bool:
        return self._experiment.eval_every > 0 and self._every_or_last(self._experiment.eval_every)

    @property
    def grid(self) -> bool:
        return self._every_or_last(self._experiment.generate_every)

    def _every_or_last(self, steps: int) -> bool:
        return self.is_last or (self.every(steps) and not self.interrupted)
