"""Validation of a model in training: losses, cosines and a distance on validation data, and grids of samples.

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

from data.codes.token_store import TokenStore
from data.images.reading import evenly_spaced
from data.validation_data import ValidationPixels, ValidationSet, open_validation_data, validation_batches
from evaluation.loss_by_position import draw_loss_by_position
from evaluation.sample_distance import SampleDistance
from modeling.losses import token_scores
from modeling.perturbation import num_perturbation_uniforms, switch_codes
from modeling.rear import ReAR
from modeling.robust_embedding import Tap
from modeling.sampling.image_sampler import exact_samples, indices_of_classes
from modeling.targets.registry import Targets
from modeling.tokenizers.tokenizer import Tokenizer
from utils.config import Config
from utils.distributed import DistributedContext
from utils.images import make_grid, write_png
from utils.precision import autocast
from utils.randomness import validation_uniforms
from utils.run.sharding import unsharded
from utils.run.training_run import TrainingRun

PERTURBATION_RATIO = 0.1  # of the perturbed context
ALIGNMENT_SAMPLES = 512  # whose cosines are computed
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
            batches: this rank's, on its device: `index` (B,), each from 0 to `num_rows` - 1 on one rank only,
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
    clean = token_scores(model(codes, class_labels, target_codes=codes).logits, codes)
    perturbed_codes = validation.perturbed_codes[rows]
    perturbed = token_scores(model(perturbed_codes, class_labels, target_codes=codes).logits, codes)
    losses, perturbed_losses = clean.losses.double(), perturbed.losses.double()  # (B, N)
    return torch.cat([losses.sum(0), clean.correct.sum()[None], perturbed_losses.sum()[None]])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside `with`, the previous mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class ValidationAlignment:
    """Cosines of the taps with their targets, on clean context, without dropout, in raster order, of up to 512 samples
    in batches at equal steps of the data. Target vectors that are computed from images are kept in host memory.

    Equal on all ranks, and for any number of ranks, which call every method.

    Attributes:
        taps: the measured taps, whose targets exist for validation data.
    """

    @dataclass
    class Batch:
        codes: Tensor  # (B, N)
        class_labels: Tensor  # (B,)
        readable: Tensor  # (B,) bool
        vectors: dict[str, Tensor]  # by tap, (B, N, Z), on the CPU; of targets that need images

    def __init__(
        self, targets: Targets, data: ValidationSet, config: Config, tokenizer: Tokenizer, ctx: DistributedContext
    ) -> None:
        self.targets = targets
        self.config = config
        self.tokenizer = tokenizer
        self.ctx = ctx
        by_tap, has_images = targets.by_tap, not isinstance(data, TokenStore)
        self.taps = [
            tap
            for tap in targets.taps
            if not by_tap[tap.name].of_training_samples and (has_images or not by_tap[tap.name].needs_images)
        ]
        self._of_images = [tap for tap in self.taps if by_tap[tap.name].needs_images]
        size = config.training.per_gpu_batch_size
        num_batches = math.ceil(len(data) / size)
        self._numbers = evenly_spaced(num_batches, min(num_batches, max(1, ALIGNMENT_SAMPLES // size)))
        self._batches: dict[int, ValidationAlignment.Batch] = {}  # by number, of this rank

    @torch.no_grad()
    def keep(self, batches: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Pass on the batches of this rank, as `validation_batches` distributes them, and keep what is needed."""
        for index, batch in enumerate(batches):
            number = index * self.ctx.size + self.ctx.rank
            if self.taps and number in self._numbers:
                codes = (batch["codes"] if "codes" in batch else self.tokenizer.encode(batch["image"])).long()
                readable = batch.get("readable", torch.ones(len(codes), dtype=torch.bool, device=codes.device))
                vectors = self.targets(self._of_images, codes, batch)
                on_host = {name: values.cpu() for name, values in vectors.items()}
                self._batches[number] = self.Batch(codes, batch["class_labels"], readable, on_host)
            yield batch

    @torch.no_grad()
    def __call__(self, model: nn.Module, validation: ValidationTokens) -> dict[str, float]:
        """By metric: `val/<tap>_cos`.

        Args:
            validation: ranks that have fewer batches repeat its first row, since FSDP needs all ranks.
        """
        if not self.taps:
            return {}
        ctx = self.ctx
        rows = [row for row, number in enumerate(self._numbers) if number in self._batches]
        rounds = max(sum(number % ctx.size == rank for number in self._numbers) for rank in range(ctx.size))
        # A row for each batch, which one rank fills, as in `validation_losses`: sums of the taps, and their count.
        sums = torch.zeros(len(self._numbers), len(self.taps) + 1, dtype=torch.float64, device=ctx.device)
        with evaluating(model), autocast(self.config.training, ctx.device):
            for turn in range(rounds):
                if turn < len(rows):
                    batch = self._batches[self._numbers[rows[turn]]]
                    sums[rows[turn]] = self._sums(model, batch)
                else:
                    model(validation.codes[:1], validation.class_labels[:1], target_codes=validation.codes[:1])
        *totals, count = ctx.all_reduce_sum(sums).sum(0).tolist()
        return {f"val/{tap.name}_cos": total / count for tap, total in zip(self.taps, totals, strict=True)}

    def _sums(self, model: nn.Module, batch: "ValidationAlignment.Batch") -> Tensor:
        projections = model(batch.codes, batch.class_labels, target_codes=batch.codes).projections
        others = [tap for tap in self.taps if tap not in self._of_images]
        vectors = self.targets(others, batch.codes, {})
        vectors |= {name: values.to(batch.codes.device) for name, values in batch.vectors.items()}
        cosines = [self._cosines(tap, projections, vectors)[batch.readable].sum() for tap in self.taps]
        return torch.stack([*cosines, batch.readable.sum() * batch.codes.shape[1]]).double()

    def _cosines(self, tap: Tap, projections: dict[str, Tensor], vectors: dict[str, Tensor]) -> Tensor:
        return tap.term(projections[tap.name], vectors[tap.name], perturbed=None)[1]


class Validator:
    """Validation losses, cosines and, for `experiment.eval_samples` > 0, a distance of samples to validation images."""

    def __init__(
        self, config: Config, tokenizer: Tokenizer, targets: Targets, ctx: DistributedContext, data: ValidationSet
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.ctx = ctx
        self.alignment = ValidationAlignment(targets, data, config, tokenizer, ctx)
        batches = self.alignment.keep(validation_batches(data, config, ctx))
        self.tokens = ValidationTokens.gather(batches, len(data), tokenizer, ctx)
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
        cls, config: Config, tokenizer: Tokenizer, tokenizer_sha256: str, targets: Targets, ctx: DistributedContext
    ) -> "Validator | None":
        """None if the config disables validation or names no validation data."""
        data = ctx.rank0_first(lambda: open_validation_data(config, tokenizer_sha256, ctx.is_rank0))
        return None if data is None else cls(config, tokenizer, targets, ctx, data)

    def compute(self, model: ReAR, run: TrainingRun) -> None:
        """Compute and log the metrics of the current step."""
        with run.pause():
            losses = validation_losses(model, self.tokens, self.config, self.ctx)
            metrics = losses.metrics | self.alignment(model, self.tokens)
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
