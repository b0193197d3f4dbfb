"""What the page asks of a model: samples, completions and reconstructions as arrays. Nothing here knows of gradio.

Legend: B images, N codes per image, H = W pixels, V codebook size.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.images.reading import ImageDataset
from data.training_batches import training_classes
from data.validation_data import open_validation_images
from evaluation.reconstruction import ReconstructionMetrics
from modeling.pretrained import class_names
from modeling.sampling.generate import CodeSampler
from modeling.sampling.image_inputs import image_inputs, image_orders, indices_of_classes
from modeling.sampling.image_sampler import ImageSampler, load_trained
from modeling.sampling.inpainting import complete
from modeling.tokenizers.registry import load_tokenizer
from scripts.complete_images import GREY, in_pixels, kept_codes
from scripts.demo_page.growth import growing_codes
from utils.config_checks import check_ranges
from utils.distributed import DistributedContext
from utils.errors import InputError
from utils.images import to_float, to_uint8
from utils.keys import keys_of
from utils.schema import Config

FRAMES = 12  # pictures of an image as it grows, before the last
KEPT_SAMPLERS = 4  # each has buffers, and on a GPU graphs, for a number of images
IMAGENET_CLASSES = 1000


class Settings(NamedTuple):
    """Keys of `model.generator` that may differ from click to click."""

    guidance_scale: float
    randomize_temperature: float
    top_k: int
    top_p: float


class DemoModel:
    """A generator with its tokenizer, on a GPU if there is one.

    Attributes:
        classes: a name for each class.
        heldout: held-out images; None: the config names none that are there.
        max_images: largest number of images per click.
        completes: which codes may stay in a completion: any, top (the first ones, as of models in raster order) or
            none (codes without a grid).

    Raises:
        InputError: no weights, those of another model, or a tokenizer without images.
    """

    def __init__(self, config: Config, max_images: int) -> None:
        self.config, self.max_images, tokenizer = config, max_images, load_tokenizer(config)
        if not tokenizer.has_images:
            raise tokenizer.no_images("scripts/demo.py")
        model, self.weights = load_trained(config, tokenizer, DistributedContext(0, 1, torch.device("cpu")))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.tokenizer = model.to(device).eval(), tokenizer.to(device).eval()
        as_the_sampler = ImageSampler(self.model, self.tokenizer, config, 1, print)
        self.decoder, self.dtype = as_the_sampler.decoder, as_the_sampler.sampler.weights.dtype
        self.classes, self.validation = class_choices(config), heldout_images(config)
        order = "top" if config.model.generator.order == "raster" else "any"
        self.completes = order if len(tokenizer.code_shape) == 2 else "none"
        self.busy = Lock()  # a sampler serves one thread at a time
        self._samplers = lru_cache(KEPT_SAMPLERS)(self._new_sampler)

    def _new_sampler(self, images: int, completing: bool) -> CodeSampler:
        """Its buffers are for these; it is configured for each click."""
        return CodeSampler(self.model, self.config.model.generator, self.dtype, self.config.sampling.compile)

    def _asked(self, count: int, seed: int, settings: Settings) -> Config:
        """The config of the scripts that do the same.

        Raises:
            InputError: a value that is missing or outside its range.
        """
        if None in (count, seed, *settings):
            raise InputError("found an empty field, expected a number in each")
        if not 1 <= count <= self.max_images:
            raise InputError(f"found {count} images, expected 1 to demo.max_images={self.max_images}")
        config = self.config
        generator = replace(config.model.generator, **settings._asdict())
        asked = replace(
            config,
            model=replace(config.model, generator=generator),
            sampling=replace(config.sampling, seed=seed, per_gpu_batch_size=count),
        )
        check_ranges(asked.model.generator, "model.generator.")
        keys_of(Config)["sampling.seed"].read(seed)
        return asked

    def sample(self, class_label: int, count: int, seed: int, settings: Settings) -> Iterator[np.ndarray]:
        """Images (count, H, W, 3) uint8 of a class while they grow, what is not there yet in grey; the last ones are
        those of `sampling.class_labels=[class_label]` and `sampling.images_per_class=count`.

        Raises:
            InputError: a value outside its range, or weights that compute no finite numbers.
        """
        config, sampler = self._asked(count, seed, settings), self._samplers(count, False)
        indices = indices_of_classes([class_label], count, self.model.num_classes)
        inputs = image_inputs(indices, self.model, seed)
        orders = image_orders(indices, self.model.image_seq_len, config.sampling)

        def sampled(on_step: Callable[[], object]) -> Tensor:
            sampler.configure(config.model.generator)
            return sampler(*inputs, on_step, orders)

        yield from self._grow(sampler, sampled, 0)

    def complete(
        self, image: np.ndarray, kept: Tensor, class_label: int | None, count: int, seed: int, settings: Settings
    ) -> Iterator[np.ndarray]:
        """Completions (count, H, W, 3) of an image (H, W, 3), uint8, while they grow, as of
        `scripts/complete_images.py` for the first image of its inputs.

        Args:
            kept: (N,) bool, from `kept_region` or `kept_around`.
            class_label: None: the null class, without guidance.

        Raises:
            InputError: as `sample`.
        """
        config, sampler = self._asked(count, seed, settings), self._samplers(count, True)
        codes = self._encode(image)[1].cpu()

        def completed(on_step: Callable[[], object]) -> Tensor:
            return complete(
                codes, kept, sampler, config, num_completions=count, class_label=class_label, on_step=on_step
            )[0]

        yield from self._grow(sampler, completed, int(kept.sum()))

    def _grow(
        self, sampler: CodeSampler, sample: Callable[[Callable[[], object]], Tensor], known: int
    ) -> Iterator[np.ndarray]:
        def in_turn(on_step: Callable[[], object]) -> Tensor:
            with self.busy:
                return sample(on_step)

        shape = self.tokenizer.code_shape
        frames = FRAMES if len(shape) == 2 else 0  # without a grid each code is in all pixels
        for codes, is_there in growing_codes(sampler, in_turn, frames, known):
            pending: Any = self.decoder.start(codes)
            images = self.decoder.finish(pending)
            if not is_there.all():
                masks = [in_pixels(grid, self.tokenizer.resolution) for grid in is_there.view(-1, *shape).cpu().numpy()]
                images = np.where(np.stack(masks)[..., None], images, np.uint8(GREY))
            yield images

    def kept_region(self, region: str, share: float) -> Tensor:
        """Mask (N,) bool of the codes that `completion.keep=REGION:SHARE` keeps.

        Raises:
            InputError: it keeps all or none, or what the model cannot complete.
        """
        return kept_codes(f"{region}:{share:.2f}", self.config, self.tokenizer)

    def kept_around(self, brushed: np.ndarray) -> Tensor:
        """Mask (N,) bool of the codes without a brushed pixel, of a mask (H', W') bool of any size.

        Raises:
            InputError: that is all or none of them.
        """
        rows, columns = self.tokenizer.code_shape
        y, x = np.nonzero(brushed)
        kept = torch.ones(rows, columns, dtype=torch.bool)
        kept[y * rows // brushed.shape[0], x * columns // brushed.shape[1]] = False
        if kept.all() or not kept.any():
            raise InputError(f"the brush leaves {int(kept.sum())} of {kept.numel()} codes, expected some, not all")
        return kept.flatten()

    def without(self, image: np.ndarray, kept: Tensor) -> np.ndarray:
        """An image (H, W, 3) with all but the kept codes (N,) in grey."""
        mask = in_pixels(kept.view(self.tokenizer.code_shape).numpy(), self.tokenizer.resolution)
        return np.where(mask[..., None], image, np.uint8(GREY))

    def reconstruct(self, image: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        """What the tokenizer makes of an image (H, W, 3) uint8, and the figures of `scripts/reconstruct.py`."""
        metrics = ReconstructionMetrics(self.tokenizer.codebook_size)
        images, codes = self._encode(image)
        with torch.inference_mode():
            decoded = self.tokenizer.decode(codes)
        metrics.update(images, decoded, codes)
        return to_uint8(decoded, self.config.sampling.uint8_rule)[0], metrics.summary()

    @torch.inference_mode()
    def _encode(self, image: np.ndarray) -> tuple[Tensor, Tensor]:
        """(1, 3, H, W) in [0, 1] and codes (1, N), on the model's device."""
        images = to_float(torch.from_numpy(image)[None].to(self.model.cls_token.device))
        return images, self.tokenizer.encode(images)

    def heldout_image(self, number: int) -> tuple[np.ndarray, int]:
        """Held-out image (H, W, 3) uint8 of this number, from 0, and its class.

        Raises:
            InputError: there is none, or it cannot be read.
        """
        count = len(self.validation or ())
        if self.validation is None or number not in range(count):
            raise InputError(f"held-out image {number}: expected 0 to {count - 1}")
        item = self.validation[number]
        return item["image"].numpy(), item["class_labels"]


def class_choices(config: Config) -> list[str]:
    """For each class its id with its name in the training data or an exported model, or that of ImageNet's 1,000."""
    num_classes, folder = config.model.generator.condition_num_classes, config.experiment.generator_checkpoint
    names, known = [], training_classes(config)
    if known is not None:
        names = known[0]
    elif folder is not None and Path(folder).is_dir():
        names = class_names(Path(folder)) or []
    if not names and num_classes == IMAGENET_CLASSES:
        from torchvision.models import ResNet50_Weights  # slow to import

        names = ResNet50_Weights.DEFAULT.meta["categories"]
    return [f"{i} {names[i] if i < len(names) else ''}".strip() for i in range(num_classes)]


def heldout_images(config: Config) -> ImageDataset | None:
    """Those of `dataset.params.eval_shards_path_or_url`, which a page can do without."""
    if config.dataset.params.eval_shards_path_or_url is None:
        return None
    try:
        return open_validation_images(config, config.model.generator.condition_num_classes)
    except InputError as error:
        print(f"no held-out images on the page: {error}")
        return None
