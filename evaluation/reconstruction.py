"""Quality of a tokenizer's reconstructions, use of its codebook, and PSNR of inpainted pixels.

Legend: B images, H x W pixels, N codes per image, V codebook size.
"""

import numpy as np
import torch
from torch import Tensor


class ReconstructionMetrics:
    """Averages over images, accumulated over batches."""

    def __init__(self, codebook_size: int) -> None:
        self.count = 0
        self.psnr = 0.0
        self.l1 = 0.0
        self.code_counts = torch.zeros(codebook_size, dtype=torch.int64)

    def update(self, images: Tensor, reconstructions: Tensor, codes: Tensor) -> None:
        """Add a batch: images and reconstructions (B, 3, H, W) in [0, 1] and codes (B, N)."""
        difference = (images - reconstructions).double()
        mse = difference.square().mean(dim=(1, 2, 3)).clamp(min=1e-10)  # (B,); equal images count 100 dB
        self.count += len(images)
        self.psnr += float((-10 * mse.log10()).sum())
        self.l1 += float(difference.abs().mean(dim=(1, 2, 3)).sum())
        self.code_counts += torch.bincount(codes.flatten().cpu(), minlength=len(self.code_counts))

    def summary(self) -> dict[str, float]:
        """
        Returns:
            images: number of them; psnr: in dB, mean over images; l1: mean absolute error of values in [0, 1];
            codebook_used: share of the V codes that occur; codebook_perplexity: exp(entropy) of the code frequencies.
        """
        frequencies = self.code_counts / self.code_counts.sum()
        entropy = -torch.special.xlogy(frequencies, frequencies).sum()
        return {
            "images": self.count,
            "psnr": self.psnr / self.count,
            "l1": self.l1 / self.count,
            "codebook_used": float((self.code_counts > 0).float().mean()),
            "codebook_perplexity": float(entropy.exp()),
        }


def psnr_of_part(inputs: np.ndarray, images: np.ndarray, mask: np.ndarray) -> float:
    """Mean PSNR in dB over the pixels of a mask; equal images count 100 dB.

    Args:
        inputs: (B, H, W, 3) uint8.
        images: (B, K, H, W, 3) uint8, K images for each input.
        mask: (H, W) bool.
    """
    difference = (images[:, :, mask].astype(np.float32) - inputs[:, None][:, :, mask]) / 255  # (B, K, pixels, 3)
    errors = np.square(difference).mean(axis=(2, 3), dtype=np.float64)
    return float(-10 * np.log10(errors.clip(min=1e-10)).mean())
