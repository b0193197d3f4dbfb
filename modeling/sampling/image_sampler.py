"""From class labels to images: the inputs of image i, its codes, and its pixels.

Image i of a seed has class i mod C and depends on (weights, config, seed, i) only, so any number of processes, in
batches of any size, samples the same images.

Legend: B images, N codes per image, V codebook size, H x W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeling.orders import ORDERS
from modeling.rear import ReAR
from modeling.sampling.generate import LOGITS_NOT_FINITE, CodeSampler, codes_in_range
from modeling.tokenizers.tokenizer import Tokenizer
from utils.errors import NonFiniteError
from utils.images import to_byte_tensor
from utils.precision import deterministic
from utils.randomness import Stream, image_uniforms
from utils.schema import Config, SamplingConfig
from utils.token_ids import token_dtype

MEMORY_SHARE = 0.2  # of the GPU's memory, for the decoder's activations
MAX_ACTIVATIONS = 2**33  # of the decoder, which has six such tensors: each of them stays within 32-bit indices
PIXELS_NOT_FINITE = "the tokenizer's pixels are not finite: its weights are damaged or do not belong to this config"


def class_labels_of(indices: Sequence[int], num_classes: int) -> np.ndarray:
    """Class labels (B,) int64 of images: i mod C, so that every stretch of images has all classes."""
    return np.asarray(indices, np.int64) % num_classes


def indices_of_classes(class_labels: Sequence[int], count: int, num_classes: int) -> list[int]:
    """Indices of `count` images of these classes, alternating between the classes; 0, 1, 2, ... for all classes.

    Raises:
        ValueError: a class label that is not 0 to C - 1; the null class has no images.
    """
    for class_label in class_labels:
        if class_label not in range(num_classes):
            raise ValueError(f"class label {class_label}: expected 0 to {num_classes - 1}")
    rounds = (divmod(i, len(class_labels)) for i in range(count))
    return [class_labels[which] + round_ * num_classes for round_, which in rounds]


def asked_images(sampling: SamplingConfig, class_labels: Sequence[int], num_classes: int) -> list[int]:
    """Indices of the images that `sampling` asks for.

    Args:
        class_labels: the ids of `sampling.class_labels`.
    """
    count = sampling.num_fid_samples
    if sampling.images_per_class:
        count = sampling.images_per_class * len(class_labels)
    return indices_of_classes(class_labels, count, num_classes)


def image_inputs(indices: Sequence[int], model: ReAR, seed: int) -> tuple[Tensor, Tensor]:
    """Class labels (B,) int64 and uniforms (B, N) of the images with these indices, on the CPU."""
    class_labels = torch.from_numpy(class_labels_of(indices, model.num_classes))
    return class_labels, image_uniforms(seed, list(indices), model.image_seq_len)


def image_orders(indices: Sequence[int], image_seq_len: int, sampling: SamplingConfig) -> Tensor | None:
    """Orders (B, N) int64 of the images with these indices, on the CPU; None: raster."""
    if sampling.order == "raster":
        return None
    uniforms = image_uniforms(sampling.seed, list(indices), image_seq_len, Stream.SAMPLING_ORDERS)
    return ORDERS[sampling.order](uniforms)


class ImageSampler:
    """Samples batches of up to `batch_size` images. Reuse it: compiling and capturing happen once.

    A smaller batch is padded with its last index: a new batch size would be compiled again, and on a GPU may round
    differently.

    Args:
        model, tokenizer: on the same device, in eval mode; their weights must not change while this object is used.
        config: the section `sampling`, and guidance, temperature, top-k and top-p of `model.generator`, are read.
        notice: receives one line if `sampling.compile=auto` falls back.
        exact: float32 and not compiled, for any config.

    Attributes:
        decoder: turns these codes into images, or returns the codes if the tokenizer has no images.

    Raises:
        ValueError: model and tokenizer do not match, the model has a different precision, or a value is out of range.
    """

    def __init__(
        self,
        model: ReAR,
        tokenizer: Tokenizer,
        config: Config,
        batch_size: int,
        notice: Callable[[str], object] = print,
        exact: bool = False,
    ) -> None:
        expected, found = ((one.image_seq_len, one.codebook_size) for one in (model, tokenizer))
        if found != expected:
            raise ValueError(
                f"tokenizer: found (codes per image, codebook size) {found}, expected the model's {expected}"
            )
        self.model = model
        self.sampling = config.sampling
        self.batch_size = batch_size
        on_gpu = model.cls_token.device.type == "cuda"
        precision = "no" if exact else self.sampling.mixed_precision
        reduced = precision == "bf16" or (precision == "auto" and on_gpu)
        self.sampler = CodeSampler(
            model,
            config.model.generator,
            dtype=torch.bfloat16 if reduced else torch.float32,
            compile_mode="off" if exact else self.sampling.compile,
            notice=notice,
        )
        self.decoder: ImageDecoder | PassThroughDecoder = PassThroughDecoder(tokenizer.codebook_size)
        if tokenizer.has_images:
            decoder_dtype = torch.float16 if reduced and on_gpu else torch.float32
            self.decoder = ImageDecoder(tokenizer, self.sampling.uint8_rule, decoder_dtype)

    def configure(self, config: Config) -> None:
        """Use this seed, order, guidance, temperature, top-k and top-p from now on; everything else is kept.

        Raises:
            ValueError: a value outside its range.
        """
        self.sampler.configure(config.model.generator)
        self.sampling = config.sampling

    def codes(
        self,
        indices: Sequence[int],
        class_labels: Tensor | None = None,
        on_step: Callable[[], object] = lambda: None,
    ) -> Tensor:
        """Codes (B, N) of the images with these indices; a GPU may still be computing them.

        Args:
            class_labels: (B,), instead of the labels of the indices.
            on_step: called after each code.

        Raises:
            ValueError: a class label that the model does not have, or an order that it was not trained for.
        """
        padded = [*indices, *[indices[-1]] * (self.batch_size - len(indices))]
        labels, uniforms = image_inputs(padded, self.model, self.sampling.seed)
        if class_labels is not None:
            labels = torch.cat([class_labels, class_labels[-1:].expand(len(padded) - len(class_labels))])
        orders = image_orders(padded, self.model.image_seq_len, self.sampling)
        return self.sampler(labels, uniforms, on_step, orders)[: len(indices)]

    def __call__(
        self,
        indices: Sequence[int],
        class_labels: Tensor | None = None,
        on_step: Callable[[], object] = lambda: None,
    ) -> np.ndarray:
        """The images (B, H, W, 3) uint8 with these indices, or codes (B, N) of `token_dtype`; arguments as for `codes`.

        Raises:
            ValueError: as `codes`.
            NonFiniteError: logits or pixels that are not finite.
        """
        pending: Any = self.decoder.start(self.codes(indices, class_labels, on_step))
        return self.decoder.finish(pending)


@deterministic(False)  # torch counts no CUDA cumsum as deterministic; along rows, as here, it is
def exact_samples(model: ReAR, tokenizer: Tokenizer, indices: Sequence[int], config: Config) -> np.ndarray:
    """The images (B, H, W, 3) uint8 with these indices, in float32 and not compiled: a few, of a model in training."""
    return ImageSampler(model, tokenizer, config, len(indices), exact=True)(indices)


@dataclass
class PendingImages:
    """Images that a GPU may still be computing."""

    codes: Tensor  # (B, N)
    images: Tensor  # (B, H, W, 3) uint8 on the CPU
    pixels_finite: Tensor  # () bool on the CPU
    codes_valid: Tensor  # () bool on the CPU
    done: torch.cuda.Event | None  # None on a CPU, which has finished

    def wait(self) -> bool:
        """Wait for the images; False if a pixel is not finite."""
        if self.done is not None:
            self.done.synchronize()
        return bool(self.pixels_finite)


class ImageDecoder:
    """Decodes batches of codes; on CUDA in a stream of its own, while the next codes are sampled.

    The rounding of a convolution depends on the batch size, and truncation to bytes makes that visible. So a CPU
    decodes images one by one, and a GPU in chunks whose size depends on its total memory, not on what is free.

    Args:
        uint8_rule: `sampling.uint8_rule`.
        dtype: float16 is as exact as TF32 here (bfloat16 is not); a batch whose values leave its range is decoded again
            in float32.
    """

    def __init__(self, tokenizer: Tokenizer, uint8_rule: str, dtype: torch.dtype = torch.float32) -> None:
        self.uint8_rule = uint8_rule
        self.codebook_size = tokenizer.codebook_size
        self.exact = tokenizer.fast_decoder().float()
        self.decoder = self.exact
        self.stream = None
        self.chunk_size = 1
        if dtype != torch.float32:
            self.decoder = tokenizer.fast_decoder().to(dtype)
        device = next(tokenizer.parameters()).device
        if device.type == "cuda":
            self.decoder = self.decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.stream = torch.cuda.Stream(device)
            memory = MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory
            activations = min(memory // dtype.itemsize, MAX_ACTIVATIONS)
            self.chunk_size = max(1, int(activations // tokenizer.decoder_activations))

    @torch.inference_mode()
    def start(self, codes: Tensor) -> PendingImages:
        """Decode codes (B, N) without waiting for the GPU."""
        if self.stream is None:
            images, finite, valid = self._decode(codes, self.decoder)
            return PendingImages(codes, images, finite, valid, done=None)
        self.stream.wait_stream(torch.cuda.current_stream(codes.device))
        codes.record_stream(self.stream)
        with torch.cuda.stream(self.stream):
            images, finite, valid = (
                torch.empty(result.shape, dtype=result.dtype, pin_memory=True).copy_(result, non_blocking=True)
                for result in self._decode(codes, self.decoder)
            )
            return PendingImages(codes, images, finite, valid, done=self.stream.record_event())

    def finish(self, pending: PendingImages) -> np.ndarray:
        """The images (B, H, W, 3) uint8 of a `start`.

        Raises:
            NonFiniteError: codes that `CodeSampler` could not sample, or pixels that are not finite in float32.
        """
        finite = pending.wait()
        images = pending.images
        if not pending.codes_valid:
            raise NonFiniteError(LOGITS_NOT_FINITE)
        if not finite and self.decoder is not self.exact:
            with torch.inference_mode():
                images, pixels_finite, _ = self._decode(pending.codes, self.exact)
                finite = bool(pixels_finite)
        if not finite:
            raise NonFiniteError(PIXELS_NOT_FINITE)
        return images.cpu().numpy()

    def _decode(self, codes: Tensor, decoder: torch.nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """On the codes' device: bytes (B, H, W, 3), whether all pixels are finite, and whether all codes are valid."""
        chunks, finite = [], []
        with torch.autocast(codes.device.type, enabled=False):
            for chunk in codes.clamp(0, self.codebook_size - 1).split(self.chunk_size):
                images = decoder(chunk)  # (b, 3, H, W)
                finite.append(images.isfinite().all())
                chunks.append(to_byte_tensor(images, self.uint8_rule))
        return torch.cat(chunks), torch.stack(finite).all(), codes_in_range(codes, self.codebook_size)


class PassThroughDecoder:
    """Replaces `ImageDecoder` for a tokenizer without images: returns the codes."""

    def __init__(self, codebook_size: int) -> None:
        self.codebook_size = codebook_size

    def start(self, codes: Tensor) -> Tensor:
        return codes

    def finish(self, codes: Tensor) -> np.ndarray:
        """Codes (B, N) of `token_dtype`.

        Raises:
            NonFiniteError: codes that `CodeSampler` could not sample.
        """
        if not codes_in_range(codes, self.codebook_size):
            raise NonFiniteError(LOGITS_NOT_FINITE)
        return codes.cpu().numpy().astype(token_dtype(self.codebook_size))
