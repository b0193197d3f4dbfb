"""Validation of a model in training: losses and a distance on validation data, and grids of samples.

The losses are comparable between steps and runs: they have no dropout, and their perturbation is always the same.

Legend: M validation samples, B of them in a batch, N codes each, V codebook size.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from data.training_batches import TrainingSet
from data.validation_data import ValidationPixels, open_validation_data, validation_batches
from evaluation.loss_by_position import draw_loss_by_position
from evaluation.sample_distance import SampleDistance
from modeling.losses import token_losses
from modeling.perturbation import num_perturbation_uniforms, switch_codes
from modeling.rear import ReAR
from modeling.sampling.image_sampler import exact_samples, indices_of_classes
from modeling.tokenizers.tokenizer import Tokenizer
from utils.config import Config
from utils.distributed import DistributedContext
from utils.images import make_grid, write_png
from utils.precision import autocast
from utils.randomness import validation_uniforms
from utils.run.sharding import unsharded
from utils.run.training_run import TrainingRun

PERTURBATION_RATIO = 0.1  # of the perturbed context
ROWS_AT_ONCE = 4096  # whose random numbers are in memory together
GRID_CLASSES, GRID_ROWS = 10, 4


@dataclass
class ValidationTokens:
    """Validation codes, on the device of the rank, equal on all ranks."""

    codes: Tensor  # (M, N) int32
    perturbed_codes: Tensor  # (M, N) int32
    class_labels: Tensor  # (M,) int64

    @classmethod
    @torch.no_grad()
    def gather(
        cls, batches: Iterable[dict[str, Tensor]], num_rows: int, tokenizer: Tokenizer, ctx: DistributedContext
    ) -> "ValidationTokens":
        """Combine the batches of all ranks, and tokenize images. All ranks call it.

        Args:
            batches: of this rank, on its device: `index` (B,), each from 0 to `num_rows` - 1 on one rank only,
                `class_labels` (B,) and `codes` (B, N) or `image` (B, 3, H, W); samples whose `readable` is false are
                left out.
            tokenizer: on the device of the rank; used for images alone.

        Raises:
            Exception: errors of `batches` and `Tokenizer.encode`.
        """
        codes = torch.zeros(num_rows, tokenizer.image_seq_len, dtype=torch.int32, device=ctx.device)
        class_labels = torch.zeros(num_rows, dtype=torch.int64, device=ctx.device)
        readable = torch.zeros(num_rows, dtype=torch.int32, device=ctx.device)
        for batch in batches:
            rows = batch["index"]
            codes[rows] = (batch["codes"] if "codes" in batch else tokenizer.encode(batch["image"])).int()
            class_labels[rows] = batch["class_labels"]
            readable[rows] = batch.get("readable", torch.ones_like(rows)).int()
        codes, class_labels, readable = (ctx.all_reduce_sum(values) for values in (codes, class_labels, readable))
        codes, class_labels = codes[readable > 0], class_labels[readable > 0]
        return cls(codes, perturbed(codes, tokenizer.codebook_size), class_labels)


def perturbed(codes: Tensor, codebook_size: int) -> Tensor:
    """Codes (M, N) with each replaced by a random one with a probability of 10 %; row i always in the same way."""
    chunks = []
    for start in range(0, len(codes), ROWS_AT_ONCE):
        chunk = codes[start : start + ROWS_AT_ONCE]
        uniforms = validation_uniforms(range(start, start + len(chunk)), num_perturbation_uniforms(codes.shape[1]))
        uniforms[:, 0] = 1  # the same ratio in all rows
        chunks.append(switch_codes(chunk, uniforms.to(codes.device), PERTURBATION_RATIO, codebook_size)[0])
    return torch.cat(chunks)


@dataclass
class ValidationLosses:
    """Means over the validation samples."""

    ar_loss: float  # nats per code, on clean context
    correct_tokens: float  # top-1 accuracy, on clean context
    ar_loss_perturbed: float  # nats per code, on the perturbed context
    by_position: np.ndarray  # (N,) float64, `ar_loss` of each position

    @property
    def metrics(self) -> dict[str, float]:
        """By name in the log."""
        return {
            "val/ar_loss": self.ar_loss,
            "val/correct_tokens": self.correct_tokens,
            "val/ar_loss_noisy": self.ar_loss_perturbed,
        }


@torch.no_grad()  # inference_mode would leave FSDP with tensors that training cannot use
def validation_losses(
    model: nn.Module, validation: ValidationTokens, config: Config, ctx: DistributedContext
) -> ValidationLosses:
    """Losses in raster order, without dropout, with true labels, in the precision of training: bit-equal on all ranks,
    and for any number of ranks. All ranks call it.

    Args:
        model: called with context (B, N) and class labels (B,), perhaps under DDP or FSDP; stays in its mode.
    """
    count, image_seq_len = validation.codes.shape
    size = config.training.per_gpu_batch_size
    last = math.ceil(count / size) - 1
    # A row for each batch, which one rank fills: the order of the sum does not depend on the number of ranks.
    sums = torch.zeros(last + 1, image_seq_len + 2, dtype=torch.float64, device=ctx.device)
    with evaluating(model), autocast(config.training, ctx.device):
        for first in range(0, last + 1, ctx.size):
            number = min(first + ctx.rank, last)  # a rank without a batch repeats the last one: FSDP needs all ranks
            result = batch_sums(model, validation, slice(number * size, (number + 1) * size))
            if first + ctx.rank <= last:
                sums[number] = result
    totals = (ctx.all_reduce_sum(sums).sum(0) / count).cpu().numpy()  # (N + 2,)
    by_position = totals[:image_seq_len]
    correct, perturbed_loss = totals[image_seq_len:].tolist()
    return ValidationLosses(
        ar_loss=float(by_position.mean()),
        correct_tokens=correct / image_seq_len,
        ar_loss_perturbed=perturbed_loss / image_seq_len,
        by_position=by_position,
    )


def batch_sums(model: nn.Module, validation: ValidationTokens, rows: slice) -> Tensor:
    """Sums over a batch, (N + 2,) float64: loss of each position, correct codes, loss on the perturbed context."""
    codes, class_labels = validation.codes[rows], validation.class_labels[rows]
    logits = model(codes, class_labels).logits  # (B, N, V)
    losses = token_losses(logits, codes).double()  # (B, N)
    correct = logits.argmax(dim=-1) == codes  # (B, N)
    perturbed_losses = token_losses(model(validation.perturbed_codes[rows], class_labels).logits, codes).double()
    return torch.cat([losses.sum(0), correct.sum()[None], perturbed_losses.sum()[None]])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside `with`, the previous mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class Validator:
    """Validation losses and, for `experiment.eval_samples` > 0, a distance of samples to validation images."""

    def __init__(self, config: Config, tokenizer: Tokenizer, ctx: DistributedContext, data: TrainingSet) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.ctx = ctx
        self.tokens = ValidationTokens.gather(validation_batches(data, config, ctx), len(data), tokenizer, ctx)
        self.distance: SampleDistance | None = None
        num_samples = config.experiment.eval_samples
        if num_samples:
            if not tokenizer.has_images:
                raise tokenizer.no_images(f"experiment.eval_samples={num_samples}")
            pixels = ctx.rank0_first(lambda: ValidationPixels(config))
            self.distance = SampleDistance(
                pixels, num_samples=num_samples, batch_size=config.sampling.per_gpu_batch_size, ctx=ctx
            )

    @classmethod
    def open(
        cls, config: Config, tokenizer: Tokenizer, tokenizer_sha256: str, ctx: DistributedContext
    ) -> "Validator | None":
        """None if the config disables validation or names no validation data."""
        data = ctx.rank0_first(lambda: open_validation_data(config, tokenizer_sha256, ctx.is_rank0))
        return None if data is None else cls(config, tokenizer, ctx, data)

    def compute(self, model: ReAR, run: TrainingRun) -> None:
        """Compute and log the metrics of the current step."""
        with run.pause():
            losses = validation_losses(model, self.tokens, self.config, self.ctx)
            metrics = losses.metrics
            if self.distance is not None:
                whole = unsharded(model, build=lambda: ReAR(self.config.model))
                with evaluating(whole):
                    metrics |= self.distance(lambda rows: exact_samples(whole, self.tokenizer, rows, self.config))
        run.log(metrics)
        run.draw("loss by position", lambda: self._save_loss_by_position(losses, run.state.global_step))

    def _save_loss_by_position(self, losses: ValidationLosses, step: int) -> Image.Image:
        picture = draw_loss_by_position(losses.by_position, self.tokenizer.code_shape, step)
        write_png(Path(self.config.experiment.output_dir) / "heldout_loss_by_position.png", picture)
        return picture


def save_sample_grid(model: ReAR, tokenizer: Tokenizer, config: Config, step: int) -> Image.Image:
    """A column of samples for each of the first classes, always with the same random numbers."""
    columns = min(GRID_CLASSES, model.num_classes)
    indices = indices_of_classes(range(columns), GRID_ROWS * columns, model.num_classes)
    with evaluating(model):
        grid = make_grid(exact_samples(model, tokenizer, indices, config), columns)
    folder = Path(config.experiment.output_dir) / "train_generated_images"
    folder.mkdir(exist_ok=True)
    write_png(folder / f"{step:07d}.png", grid)
    return grid


def notices_of_images(tokenizer: Tokenizer, config: Config) -> list[str]:
    """Lines for the log of a training whose tokenizer has no images.

    Raises:
        InputError: it would train on images.
    """
    if tokenizer.has_images:
        return []
    if config.dataset.params.pretokenization is None:
        raise tokenizer.no_images("dataset.params.pretokenization=null")
    return [f"no sample grids: model.vq_model.model_type={tokenizer.model_type} has no decoder"]
