"""Held-out numbers of a model in training, where data, model and metrics come together."""

from data.training_batches import TrainingSet
from data.validation_data import ValidationPixels, open_validation_data, validation_batches
from evaluation.sample_distance import SampleDistance
from modeling.rear import ReAR
from modeling.sampling.sample_grid import exact_samples
from modeling.tokenizers.tokenizer import Tokenizer
from modeling.validation import ValidationTokens, evaluating, save_loss_by_position, validation_losses
from utils.config import Config
from utils.distributed import DistributedContext
from utils.run.sharding import unsharded
from utils.run.training_run import TrainingRun


class Validator:
    """Losses on held-out codes and, for `experiment.eval_samples` > 0, a distance of samples to held-out images."""

    def __init__(self, config: Config, tokenizer: Tokenizer, ctx: DistributedContext, data: TrainingSet) -> None:
        self.config, self.tokenizer, self.ctx = config, tokenizer, ctx
        self.codes = ValidationTokens.of(validation_batches(data, config, ctx), len(data), tokenizer, ctx)
        self.distance: SampleDistance | None = None
        if config.experiment.eval_samples:
            if not tokenizer.has_images:
                raise tokenizer.no_images(f"experiment.eval_samples={config.experiment.eval_samples}")
            pixels = ctx.rank0_first(lambda: ValidationPixels(config))
            counts = config.experiment.eval_samples, config.sampling.per_gpu_batch_size
            self.distance = SampleDistance(pixels, *counts, ctx)

    @classmethod
    def open(
        cls, config: Config, tokenizer: Tokenizer, tokenizer_sha256: str, ctx: DistributedContext
    ) -> "Validator | None":
        """None if the config asks for none or names no held-out data."""
        data = ctx.rank0_first(lambda: open_validation_data(config, tokenizer_sha256, ctx.is_rank0))
        return None if data is None else cls(config, tokenizer, ctx, data)

    def compute(self, model: ReAR, run: TrainingRun) -> None:
        """Log them for the step that is done."""
        with run.pause():
            losses = validation_losses(model, self.codes, self.config, self.ctx)
            numbers = losses.metrics
            if self.distance is not None:
                whole = unsharded(model, build=lambda: ReAR(self.config.model))
                with evaluating(whole):
                    numbers |= self.distance(lambda rows: exact_samples(whole, self.tokenizer, rows, self.config))
        run.log(numbers)
        code_shape, step = self.tokenizer.code_shape, run.state.global_step
        run.draw("loss by position", lambda: save_loss_by_position(losses, code_shape, self.config, step))
