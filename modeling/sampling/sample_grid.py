"""The grid of samples that training saves from time to time."""

from pathlib import Path

import torch
from PIL import Image

from modeling.rear import ReAR
from modeling.sampling.generate import generate_images
from modeling.sampling.image_inputs import indices_of_classes
from modeling.tokenizers.tokenizer import Tokenizer
from utils.images import make_grid
from utils.run.snapshot import weights_of
from utils.run.training_run import TrainingRun
from utils.schema import Config

GRID_CLASSES, GRID_ROWS = 10, 4


def whole_on_main(model: ReAR, run: TrainingRun) -> ReAR:
    """The model or, if it is sharded, on rank 0 one with all its weights: sampling reads them outside of the forward
    pass. All ranks call it."""
    if not run.config.training.fsdp:
        return model
    with run.measured.clock.pause():
        weights = weights_of(model, sharded=True)
        if not run.world.is_main:
            return model
        with torch.device("meta"):
            whole = ReAR(run.config.model)
        on_device = {name: weight.to(run.world.device) for name, weight in weights.items()}
        whole.load_state_dict(on_device, assign=True)
        return whole


def save_sample_grid(model: ReAR, tokenizer: Tokenizer, config: Config, step: int) -> Image.Image:
    """A column of samples for each of the first classes; always the same classes and random numbers."""
    columns = min(GRID_CLASSES, model.num_classes)
    indices = indices_of_classes(range(columns), GRID_ROWS * columns, model.num_classes)
    was_training = model.training
    grid = make_grid(generate_images(model.eval(), tokenizer, indices, config), columns)
    model.train(was_training)
    folder = Path(config.experiment.output_dir) / "train_generated_images"
    folder.mkdir(exist_ok=True)
    grid.save(folder / f"{step:07d}.png")
    return grid
