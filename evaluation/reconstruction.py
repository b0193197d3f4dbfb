"""Quality of a tokenizer's reconstructions, use of its codebook, and PSNR of inpainted pixels.

Legend: B images, H x W pixels, N codes per image, V codebook size.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # pixels
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2


class ReconstructionMetrics:
    """Averages over images, accumulated over batches."""

    def __init__(self, codebook_size: int) -> None:
        self.count = 0
        self.psnr = 0.0
        self.l1 = 0.0
        self.ssim = 0.0
        self.hue_difference = self.chroma = self.chroma_difference = 0.0
        self.code_counts = torch.zeros(codebook_size, dtype=torch.int64)

    def update(self, images: Tensor, reconstructions: Tensor, codes: Tensor) -> None:
        """Add a batch: images and reconstructions (B, 3, H, W) in [0, 1] and codes (B, N)."""
        difference = (images - reconstructions).double()
        mse = difference.square().mean(dim=(1, 2, 3)).clamp(min=1e-10)  # (B,); equal images count 100 dB
        self.count += len(images)
        self.psnr += float((-10 * mse.log10()).sum())
        self.l1 += float(difference.abs().mean(dim=(1, 2, 3)).sum())
        self.ssim += float(ssim(images, reconstructions).sum())
        hue, chroma = hue_and_chroma(images)
        reconstructed_hue, reconstructed_chroma = hue_and_chroma(reconstructions)
        turn = (reconstructed_hue - hue).remainder(2 * math.pi)
        self.hue_difference += float((torch.minimum(turn, 2 * math.pi - turn) * chroma).sum())
        self.chroma += float(chroma.sum())
        self.chroma_difference += float((reconstructed_chroma - chroma).abs().mean(dim=(1, 2)).sum())
        self.code_counts += torch.bincount(codes.flatten().cpu(), minlength=len(self.code_counts))

    def summary(self) -> dict[str, float]:
        """
        Returns:
            images: number of them; psnr: in dB, mean over images; l1: mean absolute error of values in [0, 1];
            ssim: mean over images; hue_error: mean difference of hues in degrees, each pixel weighted by its chroma, 0
            for grey images; saturation_error: mean absolute difference of chroma, which is 1 for pure colours;
            codebook_used: share of the V codes that occur; codebook_perplexity: exp(entropy) of the code frequencies.
        """
        frequencies = self.code_counts / self.code_counts.sum()
        entropy = -torch.special.xlogy(frequencies, frequencies).sum()
        return {
            "images": self.count,
            "psnr": self.psnr / self.count,
            "l1": self.l1 / self.count,
            "ssim": self.ssim / self.count,
            "hue_error": math.degrees(self.hue_difference / max(self.chroma, 1e-10)),
            "saturation_error": self.chroma_difference / self.count,
            "codebook_used": float((self.code_counts > 0).float().mean()),
            "codebook_perplexity": float(entropy.exp()),
        }


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity (B,) of images (B, 3, H, W) in [0, 1], the mean over channels and positions of a Gaussian
    window, which is smaller for images below 11 pixels.

    Source: Wang et al., Image quality assessment: from error visibility to structural similarity, 2004.
    """
    size = min(SSIM_WINDOW, *images.shape[2:])
    offsets = torch.arange(size, dtype=torch.float64, device=images.device) - (size - 1) / 2
    profile = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    window = torch.outer(profile, profile) / profile.sum() ** 2

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(values, window.expand(3, 1, size, size), groups=3)

    x, y = images.double(), others.double()
    mean_x, mean_y = mean(x), mean(y)
    variance_x, variance_y = mean(x * x) - mean_x.square(), mean(y * y) - mean_y.square()
    covariance = mean(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + SSIM_C1) / (mean_x.square() + mean_y.square() + SSIM_C1)
    structure = (2 * covariance + SSIM_C2) / (variance_x + variance_y + SSIM_C2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def hue_and_chroma(images: Tensor) -> tuple[Tensor, Tensor]:
    """Angle in radians and length (B, H, W) of the colours of images (B, 3, H, W) in the plane orthogonal to grey; pure
    red is at angle 0 and length 1."""
    red, green, blue = images.double().unbind(dim=1)
    a, b = red - (green + blue) / 2, math.sqrt(3) / 2 * (green - blue)
    return torch.atan2(b, a), torch.hypot(a, b)


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
