"""What is due after a step."""

from utils.run.manifest import TrainingState
from utils.run.nonfinite_guard import NonFiniteGuard
from utils.schema import ExperimentConfig


class StepTriggers:
    """Looks at the number of steps that are done, at the last one to come and at stop signals.

    Args:
        stop: number of steps after which the run ends.
    """

    def __init__(self, experiment: ExperimentConfig, state: TrainingState, stop: int, guard: NonFiniteGuard) -> None:
        self._experiment, self._state, self._stop, self._guard = experiment, state, stop, guard

    def every(self, steps: int) -> bool:
        """The number of steps that are done is a multiple of `steps`; never for 0."""
        return steps > 0 and self._state.global_step % steps == 0

    @property
    def is_last(self) -> bool:
        return self._state.global_step == self._stop

    @property
    def log(self) -> bool:
        return (
            self.every(self._experiment.log_every) or self._state.global_step == 1 or self.is_last or self._guard.stop
        )

    @property
    def save(self) -> bool:
        return self.every(self._experiment.save_every) and not self.is_last and not self._guard.stop

    @property
    def weights(self) -> bool:
        return self.every(self._experiment.save_weights_every)

    @property
    def validation(self) -> bool:
        return self._experiment.eval_every > 0 and self._after(self._experiment.eval_every)

    @property
    def grid(self) -> bool:
        return self._after(self._experiment.generate_every)

    def _after(self, steps: int) -> bool:
        return self.is_last or (self.every(steps) and not self._guard.stop)
