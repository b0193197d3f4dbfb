"""The samples that training makes from time to time."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from modeling.rear import ReAR
from modeling.sampling.image_inputs import indices_of_classes
from modeling.sampling.image_sampler import ImageSampler
from modeling.tokenizers.tokenizer import Tokenizer
from modeling.validation import evaluating
from utils.images import make_grid, write_png
from utils.precision import deterministic
from utils.schema import Config

GRID_CLASSES, GRID_ROWS = 10, 4


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


@deterministic(False)  # CUDA counts no cumulative sum as deterministic; along rows, as here, they are
def exact_samples(model: ReAR, tokenizer: Tokenizer, indices: Sequence[int], config: Config) -> np.ndarray:
    """The images (B, H, W, 3) uint8 with these indices, in float32 and not compiled: a few, of weights that change."""
    return ImageSampler(model, tokenizer, config, len(indices), exact=True)(indices)


def save_sample_grid(model: ReAR, tokenizer: Tokenizer, config: Config, step: int) -> Image.Image:
    """A column of samples for each of the first classes; always the same classes and random numbers."""
    columns = min(GRID_CLASSES, model.num_classes)
    indices = indices_of_classes(range(columns), GRID_ROWS * columns, model.num_classes)
    with evaluating(model):
        grid = make_grid(exact_samples(model, tokenizer, indices, config), columns)
    folder = Path(config.experiment.output_dir) / "train_generated_images"
    folder.mkdir(exist_ok=True)
    write_png(folder / f"{step:07d}.png", grid)
    return grid
