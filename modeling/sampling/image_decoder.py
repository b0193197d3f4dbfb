"""From sampled codes to images of bytes with the tokenizer's fast decoder, on a GPU beside the sampling.

Legend: B images, N codes per image, H x W pixels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modeling.tokenizers.tokenizer import Tokenizer
from utils.errors import NonFiniteError
from utils.images import to_byte_tensor

MEMORY_SHARE = 0.2  # of the GPU's memory, for the decoder's activations
MAX_NUMBERS = 2**33  # of its activations, which are six tensors: so each of them is within 32-bit indices
LOGITS_NOT_FINITE = "the generator's logits are not finite: its weights are damaged, or no use"
PIXELS_NOT_FINITE = "the tokenizer's pixels are not finite: its weights are damaged, or no use"


@dataclass
class PendingImages:
    """Images that a GPU may still be at work on."""

    codes: Tensor  # (B, N) what they are decoded from
    images: Tensor  # (B, H, W, 3) uint8 on the CPU
    finite: Tensor  # () bool on the CPU: all pixels
    sampled: Tensor  # () bool on the CPU: the codes are of the codebook
    done: torch.cuda.Event | None  # None on a CPU: there they are finished

    def wait(self) -> bool:
        """Wait for the images; False if one of them is not finite."""
        if self.done is not None:
            self.done.synchronize()
        return bool(self.finite)


class ImageDecoder:
    """Decodes batches of codes; on CUDA in a stream of its own, while the next codes are sampled.

    The rounding of a convolution depends on the batch size, and truncation to bytes makes that visible. So on a CPU
    images are decoded one by one, and on a GPU in chunks whose size depends on its total memory, not on what is free.

    Args:
        uint8_rule: `sampling.uint8_rule`.
        dtype: float16 is as exact as TF32 here (bfloat16 is not); a batch whose values leave its range is decoded again
            in float32.
    """

    def __init__(self, tokenizer: Tokenizer, uint8_rule: str, dtype: torch.dtype = torch.float32) -> None:
        self.uint8_rule = uint8_rule
        self.codebook_size, device = tokenizer.codebook_size, next(tokenizer.parameters()).device
        self.exact = tokenizer.fast_decoder().float()
        self.decoder = self.exact
        self.stream, self.chunk_size = None, 1
        if dtype != torch.float32:
            self.decoder = tokenizer.fast_decoder().to(dtype)
        if device.type == "cuda":
            self.decoder = self.decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.stream = torch.cuda.Stream(device)
            memory = MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory
            numbers = min(memory // dtype.itemsize, MAX_NUMBERS)
            self.chunk_size = max(1, int(numbers // tokenizer.decoder_activations))

    @torch.inference_mode()
    def start(self, codes: Tensor) -> PendingImages:
        """Decode codes (B, N) without waiting for the GPU."""
        if self.stream is None:
            images, finite, sampled = self._decode(codes, self.decoder)
            return PendingImages(codes, images, finite, sampled, None)
        self.stream.wait_stream(torch.cuda.current_stream(codes.device))
        codes.record_stream(self.stream)
        with torch.cuda.stream(self.stream):
            images, finite, sampled = (
                torch.empty(result.shape, dtype=result.dtype, pin_memory=True).copy_(result, non_blocking=True)
                for result in self._decode(codes, self.decoder)
            )
            return PendingImages(codes, images, finite, sampled, self.stream.record_event())

    def finish(self, pending: PendingImages) -> np.ndarray:
        """The images (B, H, W, 3) uint8 that `start` began with.

        Raises:
            NonFiniteError: codes that `CodeSampler` could not sample, or pixels that are not finite in float32.
        """
        is_finite, images = pending.wait(), pending.images
        if not pending.sampled:
            raise NonFiniteError(LOGITS_NOT_FINITE)
        if not is_finite and self.decoder is not self.exact:
            with torch.inference_mode():
                images, finite, _ = self._decode(pending.codes, self.exact)
                is_finite = bool(finite)
        if not is_finite:
            raise NonFiniteError(PIXELS_NOT_FINITE)
        return images.cpu().numpy()

    def _decode(self, codes: Tensor, decoder: torch.nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Bytes (B, H, W, 3) on the codes' device, whether all values were finite, and whether all codes are codes."""
        parts, finite = [], []
        with torch.autocast(codes.device.type, enabled=False):
            for chunk in codes.clamp(0, self.codebook_size - 1).split(self.chunk_size):
                images = decoder(chunk)  # (b, 3, H, W)
                finite.append(images.isfinite().all())
                parts.append(to_byte_tensor(images, self.uint8_rule))
        return torch.cat(parts), torch.stack(finite).all(), are_codes(codes, self.codebook_size)


class KeptCodes:
    """In the place of an `ImageDecoder` for a tokenizer without images: the codes as they are."""

    def __init__(self, codebook_size: int) -> None:
        self.codebook_size = codebook_size

    def start(self, codes: Tensor) -> Tensor:
        return codes

    def finish(self, codes: Tensor) -> np.ndarray:
        """Codes (B, N) uint16.

        Raises:
            NonFiniteError: codes that `CodeSampler` could not sample.
        """
        if not are_codes(codes, self.codebook_size):
            raise NonFiniteError(LOGITS_NOT_FINITE)
        return codes.cpu().numpy().astype(np.uint16)


def are_codes(codes: Tensor, codebook_size: int) -> Tensor:
    """() bool on the codes' device: all are from 0 to V - 1."""
    return ((codes >= 0) & (codes < codebook_size)).all()
