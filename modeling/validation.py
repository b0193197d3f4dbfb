"""Losses on held-out data: comparable from step to step and from run to run, whatever noise and dropout training has.

Legend: M samples, B of them in a batch, N codes each, V codebook size.
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

from modeling.losses import token_losses
from modeling.noise import num_noise_uniforms, switch_codes
from modeling.tokenizers.tokenizer import Tokenizer
from utils.distributed import DistributedContext
from utils.images import write_png
from utils.precision import autocast
from utils.randomness import validation_uniforms
from utils.schema import Config

NOISY_SHARE = 0.1  # of the context codes
ROWS_AT_ONCE = 4096  # whose random numbers are in memory together


@dataclass
class ValidationTokens:
    """Held-out codes, on the device of the rank, equal on all ranks."""

    codes: Tensor  # (M, N) int32
    noisy_codes: Tensor  # (M, N) int32, always the same of them replaced
    class_labels: Tensor  # (M,) int64

    @classmethod
    @torch.no_grad()
    def of(
        cls, batches: Iterable[dict[str, Tensor]], num_rows: int, tokenizer: Tokenizer, ctx: DistributedContext
    ) -> "ValidationTokens":
        """Put together what the ranks read, and tokenize it if it is images. All ranks call it.

        Args:
            batches: of this rank, on its device: `index` (B,), each from 0 to `num_rows` - 1 on one rank only,
                `class_labels` (B,) and `codes` (B, N) or `image` (B, 3, H, W); samples whose `readable` is false are
                left out.
            tokenizer: on the device of the rank; used for images alone.

        Raises:
            Exception: what `batches` and `Tokenizer.encode` raise.
        """
        codes = torch.zeros(num_rows, tokenizer.image_seq_len, dtype=torch.int32, device=ctx.device)
        class_labels = torch.zeros(num_rows, dtype=torch.int64, device=ctx.device)
        kept = torch.zeros(num_rows, dtype=torch.int32, device=ctx.device)
        for batch in batches:
            rows = batch["index"]
            found = batch["codes"] if "codes" in batch else tokenizer.encode(batch["image"])
            codes[rows], class_labels[rows] = found.int(), batch["class_labels"]
            kept[rows] = batch.get("readable", torch.ones_like(rows)).int()
        codes, class_labels, kept = (ctx.all_reduce_sum(values) for values in (codes, class_labels, kept))
        codes, class_labels = codes[kept > 0], class_labels[kept > 0]
        return cls(codes, replace_some(codes, tokenizer.codebook_size), class_labels)


def replace_some(codes: Tensor, codebook_size: int) -> Tensor:
    """Codes (M, N) with each replaced by a random one with a probability of 10 %; row i always in the same way."""
    parts = []
    for first in range(0, len(codes), ROWS_AT_ONCE):
        part = codes[first : first + ROWS_AT_ONCE]
        uniforms = validation_uniforms(range(first, first + len(part)), num_noise_uniforms(codes.shape[1]))
        uniforms[:, 0] = 1  # the same share in all rows
        parts.append(switch_codes(part, uniforms.to(codes.device), NOISY_SHARE, codebook_size)[0])
    return torch.cat(parts)


@dataclass
class ValidationLosses:
    """Means over the held-out samples."""

    ar_loss: float  # nats per code, on clean context
    correct_tokens: float  # share of codes whose logit is the largest, on clean context
    ar_loss_noisy: float  # nats per code, with 10 % of the context replaced
    by_position: np.ndarray  # (N,) float64, `ar_loss` of each position

    @property
    def metrics(self) -> dict[str, float]:
        """By name in the log."""
        return {
            "val/ar_loss": self.ar_loss,
            "val/correct_tokens": self.correct_tokens,
            "val/ar_loss_noisy": self.ar_loss_noisy,
        }


@torch.no_grad()  # inference_mode would leave FSDP with tensors that training cannot use
def validation_losses(
    model: nn.Module, validation: ValidationTokens, config: Config, ctx: DistributedContext
) -> ValidationLosses:
    """Losses without dropout, with true labels, in the precision of training: the same on all ranks, and for any number
    of them, bit by bit. All ranks call it.

    Args:
        model: called with context (B, N) and class labels (B,), perhaps under DDP or FSDP; stays in its mode.
    """
    count, image_seq_len = validation.codes.shape
    size = config.training.per_gpu_batch_size
    last = math.ceil(count / size) - 1
    # Per batch what its rank alone computes; the others add 0, and the order of the sum is that of the batches.
    sums = torch.zeros(last + 1, image_seq_len + 2, dtype=torch.float64, device=ctx.device)
    with evaluating(model), autocast(config.training, ctx.device):
        for first in range(0, last + 1, ctx.size):
            number = min(first + ctx.rank, last)  # a batch again where none is left: FSDP wants all ranks
            result = _sums(model, validation, slice(number * size, (number + 1) * size))
            if first + ctx.rank <= last:
                sums[number] = result
    totals = (ctx.all_reduce_sum(sums).sum(0) / count).cpu().numpy()  # (N + 2,)
    by_position, (correct, noisy) = totals[:image_seq_len], totals[image_seq_len:].tolist()
    return ValidationLosses(float(by_position.mean()), correct / image_seq_len, noisy / image_seq_len, by_position)


def _sums(model: nn.Module, validation: ValidationTokens, rows: slice) -> Tensor:
    """Of a batch, (N + 2,) float64: loss of each position, number of right guesses, loss on noisy context."""
    codes, class_labels = validation.codes[rows], validation.class_labels[rows]
    logits = model(codes, class_labels).logits  # (B, N, V)
    losses, correct = token_losses(logits, codes).double(), logits.argmax(dim=-1) == codes  # both (B, N)
    noisy_losses = token_losses(model(validation.noisy_codes[rows], class_labels).logits, codes).double()
    return torch.cat([losses.sum(0), correct.sum()[None], noisy_losses.sum()[None]])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout inside `with`, in the mode from before after it."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def save_loss_by_position(
    losses: ValidationLosses, code_shape: tuple[int, ...], config: Config, step: int
) -> Image.Image:
    """Draw them to `<experiment.output_dir>/heldout_loss_by_position.png`."""
    picture = draw_loss_by_position(losses.by_position, code_shape, step)
    write_png(Path(config.experiment.output_dir) / "heldout_loss_by_position.png", picture)
    return picture


def draw_loss_by_position(by_position: np.ndarray, code_shape: tuple[int, ...], step: int) -> Image.Image:
    """Losses (N,) in nats per code against their position, and on the grid of the codes if `code_shape` is one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here, for it slows the start of all ranks
    from matplotlib.figure import Figure

    mean, has_grid = by_position.mean(), len(code_shape) == 2
    figure = Figure(figsize=(9.6 if has_grid else 5.6, 3.8), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(f"held-out loss by position, step {step}: mean {mean:.3f} nats per code", fontsize="medium")
    curve, *grid = figure.subplots(1, 1 + has_grid, squeeze=False, width_ratios=[1.3, 1][: 1 + has_grid])[0]
    curve.plot(range(1, len(by_position) + 1), by_position, linewidth=1)
    curve.axhline(mean, color="grey", linewidth=0.8, linestyle="--", label="mean")
    x_label = "position in raster order" if has_grid else "position (codes without a grid)"
    curve.set(xlabel=x_label, ylabel="nats per code", xlim=(1, len(by_position)))
    curve.legend(frameon=False)
    for axes in grid:
        rows, columns = code_shape
        image = axes.imshow(by_position.reshape(code_shape), extent=(0.5, columns + 0.5, rows + 0.5, 0.5))
        axes.set(xlabel="column", ylabel="row")
        axes.locator_params(integer=True)
        figure.colorbar(image, ax=axes, label="nats per code")
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
