"""The model behind scripts/demo.py: samples, completions and reconstructions as arrays, and uploads, without gradio.

Legend: N codes per image, H x W pixels.
"""

import io
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.images.image_io import ImageDecoding
from data.images.reading import ImageDataset
from data.images.transforms import NUM_DRAWS, center_crop_transform
from data.training_batches import known_classes
from data.validation_data import open_validation_images
from evaluation.reconstruction import ReconstructionMetrics
from modeling.loading import class_names, load_generator, load_tokenizer
from modeling.sampling.image_sampler import ImageSampler, indices_of_classes
from modeling.sampling.inpainting import inpaint
from scripts.complete_images import GREY, conditioning_mask, in_pixels
from utils.errors import InputError
from utils.images import to_float, to_uint8
from utils.run.weights_path import find_generator_weights
from utils.schema import Config, PreprocessingConfig

IMAGENET_CLASSES = 1000
MAX_BYTES = 20_000_000  # of an upload
MAX_PIXELS = 50_000_000  # of a picture; 200 MB as RGBA
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow's readers of some others, such as EPS, start programs


class Settings(NamedTuple):
    """Keys of `model.generator` that the page sets for each click."""

    guidance_scale: float
    randomize_temperature: float
    top_k: int
    top_p: float


class DemoModel:
    """A generator with its tokenizer, on a GPU if there is one. Images are (H, W, 3) uint8.

    Attributes:
        classes: names by class id.
        validation: validation images; None if the config has none.
        has_grid: codes are a grid, which completion requires.
        any_order: any codes can be conditioning tokens; False (raster order): only the first ones.

    Raises:
        InputError: no weights, weights of a different model, or a tokenizer without images.
    """

    def __init__(self, config: Config) -> None:
        tokenizer = load_tokenizer(config)
        if not tokenizer.has_images:
            raise tokenizer.no_images("scripts/demo.py")
        self.weights, config = find_generator_weights(config, tokenizer.sha256())
        self.config = config
        model = load_generator(self.weights.path, config.model)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.tokenizer = model.to(self.device).eval(), tokenizer.to(self.device).eval()
        trained = self.weights.class_names
        self.classes = names_of_classes(config, trained)
        for class_id in self.weights.untrained_classes:
            self.classes[class_id] += " (no training samples)"
        self.validation = find_validation_images(config, trained)
        self.has_grid = len(tokenizer.code_shape) == 2
        self.any_order = config.model.generator.order != "raster"
        # A sampler has buffers, and on a GPU graphs, for one number of images.
        self.image_sampler = lru_cache(maxsize=4)(self._image_sampler)

    def _image_sampler(self, count: int) -> ImageSampler:
        return ImageSampler(self.model, self.tokenizer, self.config, batch_size=count)

    def _config_with(self, settings: Settings, seed: int) -> Config:
        config = self.config
        generator = replace(config.model.generator, **settings._asdict())
        model, sampling = replace(config.model, generator=generator), replace(config.sampling, seed=seed)
        return replace(config, model=model, sampling=sampling)

    def sample(self, class_label: int, count: int, seed: int, settings: Settings) -> np.ndarray:
        """Images (count, H, W, 3), equal to sample_imagenet_rear.py with `sampling.class_labels=[class_label]`. Raises
        InputError for a setting outside its range, or weights that compute no finite numbers."""
        sampler = self.image_sampler(count)
        sampler.configure(self._config_with(settings, seed))
        return sampler(indices_of_classes([class_label], count, self.model.num_classes))

    def complete(
        self, image: np.ndarray, kept: Tensor, class_label: int | None, count: int, seed: int, settings: Settings
    ) -> np.ndarray:
        """Completions (count, H, W, 3), equal to complete_images.py if `image` is its first input; raises like
        `sample`.

        Args:
            kept: conditioning mask (N,) bool, from `kept_region` or `kept_around`.
            class_label: None: the null class, without guidance.
        """
        config, sampler = self._config_with(settings, seed), self.image_sampler(count)
        sampling = replace(config.sampling, per_gpu_batch_size=count)
        codes = inpaint(
            self._encode(image)[1].cpu(),
            kept,
            sampler.sampler,
            replace(config, sampling=sampling),
            num_completions=count,
            class_label=class_label,
        )[0]  # (count, N)
        pending: Any = sampler.decoder.start(codes.to(self.device))
        return sampler.decoder.finish(pending)

    def kept_region(self, region: str) -> Tensor:
        """Conditioning mask (N,) bool of `completion.keep=REGION:0.5`; raises InputError if the model cannot complete
        that."""
        return conditioning_mask(f"{region}:0.5", self.config, self.tokenizer)

    def kept_around(self, brushed: np.ndarray) -> Tensor:
        """Conditioning mask (N,) bool of the codes without a brushed pixel, for a mask (H', W') bool of any size;
        raises InputError for all or none of them."""
        rows, columns = self.tokenizer.code_shape
        y, x = np.nonzero(brushed)
        kept = torch.ones(rows, columns, dtype=torch.bool)
        kept[y * rows // brushed.shape[0], x * columns // brushed.shape[1]] = False
        if kept.all() or not kept.any():
            raise InputError(f"the brush leaves {int(kept.sum())} of {kept.numel()} codes, expected some, not all")
        return kept.flatten()

    def hide(self, image: np.ndarray, kept: Tensor) -> np.ndarray:
        """The image in grey outside the conditioning mask (N,)."""
        mask = in_pixels(kept.view(self.tokenizer.code_shape).numpy(), self.tokenizer.resolution)
        return np.where(mask[..., None], image, np.uint8(GREY))

    def reconstruct(self, image: np.ndarray) -> tuple[np.ndarray, float]:
        """The reconstruction of an image, and its PSNR in dB, as in reconstruct.py."""
        metrics = ReconstructionMetrics(self.tokenizer.codebook_size)
        images, codes = self._encode(image)
        with torch.inference_mode():
            decoded = self.tokenizer.decode(codes)
        metrics.update(images, decoded, codes)
        return to_uint8(decoded, self.config.sampling.uint8_rule)[0], metrics.summary()["psnr"]

    @torch.inference_mode()
    def _encode(self, image: np.ndarray) -> tuple[Tensor, Tensor]:
        """(1, 3, H, W) in [0, 1] and codes (1, N)."""
        images = to_float(torch.from_numpy(image)[None].to(self.device))
        return images, self.tokenizer.encode(images)


def names_of_classes(config: Config, trained: list[str] | None) -> list[str]:
    """Each class's id and name, from the weights, an exported model, the training data or ImageNet."""
    num_classes, folder = config.model.generator.condition_num_classes, config.experiment.generator_checkpoint
    if trained is None and folder is not None and Path(folder).is_dir():
        trained = class_names(Path(folder))  # of an exported model
    known = known_classes(config, trained)
    names = known[0] if known is not None else []
    if not names and num_classes == IMAGENET_CLASSES:
        from torchvision.models import ResNet50_Weights  # slow to import

        names = ResNet50_Weights.DEFAULT.meta["categories"]
    return [f"{i} {names[i] if i < len(names) else ''}".strip() for i in range(num_classes)]


def find_validation_images(config: Config, trained: list[str] | None) -> ImageDataset | None:
    """The images of `dataset.params.eval_shards_path_or_url`; None without any."""
    if config.dataset.params.eval_shards_path_or_url is None:
        return None
    try:
        return open_validation_images(config, config.model.generator.condition_num_classes, trained)
    except InputError as error:
        print(f"no validation images on the page: {error}")
        return None


def read_upload(path: Path, preprocessing: PreprocessingConfig) -> np.ndarray:
    """The centre crop (H, W, 3) uint8 of a picture, of the first of several frames. Raises InputError for too many
    bytes or pixels, or an unreadable picture."""
    if (size := path.stat().st_size) > MAX_BYTES:
        raise InputError(f"{path.name}: found {size} bytes, expected at most {MAX_BYTES}")
    encoded = path.read_bytes()
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:  # no pixel is decoded yet
            if image.width * image.height > MAX_PIXELS:
                raise InputError(f"found too many pixels, expected at most {MAX_PIXELS}")
        picture = ImageDecoding.of(preprocessing).decode(encoded)
    except InputError as error:
        raise InputError(f"{path.name}: {error}") from error
    except Exception as error:  # damaged files raise errors of many kinds
        raise InputError(f"{path.name}: found no picture that can be read, expected {', '.join(FORMATS)}") from error
    center_crop = center_crop_transform(preprocessing)
    return center_crop(picture, np.zeros(NUM_DRAWS)).numpy()
