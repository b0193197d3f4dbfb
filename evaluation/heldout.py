"""Held-out numbers of a model in training, where data, model and metrics come together."""

from data.heldout import HeldOutPixels, heldout_batches, open_heldout
from data.training_batches import TrainingSet
from evaluation.sample_distance import SampleDistance
from modeling.heldout import HeldOut, evaluating, heldout_losses, save_loss_by_position
from modeling.rear import ReAR
from modeling.sampling.sample_grid import exact_samples, whole_model
from modeling.tokenizers.tokenizer import Tokenizer
from utils.config import Config
from utils.ranks import World
from utils.run.training_run import TrainingRun


class HeldOutNumbers:
    """Losses on held-out codes and, for `experiment.eval_samples` > 0, a distance of samples to held-out images."""

    def __init__(self, config: Config, tokenizer: Tokenizer, world: World, data: TrainingSet) -> None:
        self.config, self.tokenizer, self.world = config, tokenizer, world
        self.codes = HeldOut.of(heldout_batches(data, config, world), len(data), tokenizer, world)
        self.distance: SampleDistance | None = None
        if config.experiment.eval_samples:
            if not tokenizer.has_images:
                raise tokenizer.no_images(f"experiment.eval_samples={config.experiment.eval_samples}")
            pixels = world.main_first(lambda: HeldOutPixels(config))
            counts = config.experiment.eval_samples, config.sampling.per_gpu_batch_size
            self.distance = SampleDistance(pixels, *counts, world)

    @classmethod
    def open(cls, config: Config, tokenizer: Tokenizer, tokenizer_sha256: str, world: World) -> "HeldOutNumbers | None":
        """None if the config asks for none or names no held-out data."""
        data = world.main_first(lambda: open_heldout(config, tokenizer_sha256, world.is_main))
        return None if data is None else cls(config, tokenizer, world, data)

    def compute(self, model: ReAR, run: TrainingRun) -> None:
        """Log them for the step that is done."""
        with run.measured.clock.pause():
            losses = heldout_losses(model, self.codes, self.config, self.world)
            numbers = losses.metrics
            if self.distance is not None:
                whole = whole_model(model, run)
                with evaluating(whole):
                    numbers |= self.distance(lambda rows: exact_samples(whole, self.tokenizer, rows, self.config))
        run.reporter.log(numbers)
        place = self.tokenizer.code_shape, self.config, run.state.global_step
        run.reporter.draw("loss by position", lambda: save_loss_by_position(losses, *place))
