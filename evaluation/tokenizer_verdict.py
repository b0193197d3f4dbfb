"""What a trained tokenizer loses, in words: no generator on its tokens can do better.

Legend: n images, H x W pixels.
"""

from collections.abc import Mapping

import numpy as np
import torch

from evaluation.collect import ImagesInMemory, collect
from evaluation.features import EncoderFeatures
from evaluation.metrics import frechet_distance
from utils.distributed import DistributedContext

FEATURE_BATCH = 16
CLEAR_GAIN_DB = 1.0  # above k-means of patches; a smaller one means that training has hardly begun
GOOD_PSNR_DB = 24.0  # below, a person sees at a glance that small pictures have lost details
LOW_USE = 0.5  # of the codebook, by images that have `TOKENS_PER_ENTRY` tokens for each entry
TOKENS_PER_ENTRY = 8


def distance_of_reconstructions(images: np.ndarray, reconstructions: np.ndarray, device: torch.device) -> float:
    """Frechet distance, on EfficientNet-Lite0 features, of at least 2 reconstructions (n, H, W, 3) uint8 to the images.
    In one process."""
    extractor = EncoderFeatures("efficientnet_lite0", device)
    gaussians = [
        collect(
            ImagesInMemory(of),
            extractor,
            DistributedContext(0, 1, device),
            batch_size=FEATURE_BATCH,
            title=title,
        ).pool.gaussian()
        for title, of in (("features of held-out images", images), ("features of reconstructions", reconstructions))
    ]
    return frechet_distance(*gaussians)


def worst_first(images: np.ndarray, reconstructions: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` images (n, H, W, 3) uint8 with the largest squared error, the worst first."""
    difference = images.astype(np.float32) - reconstructions
    return np.square(difference).mean(axis=(1, 2, 3)).argsort(kind="stable")[::-1][:count]


def verdict(
    metrics: Mapping[str, float], *, num_tokens: int, more_tokens: int | None, codebook_size: int, steps: int
) -> list[str]:
    """Lines that say how good the reconstructions are and, if the tokenizer limits what samples can look like, what to
    do.

    Args:
        metrics: of `ReconstructionMetrics`; `patch_psnr` and `reconstruction_distance` may be missing.
        more_tokens: the next larger number of tokens per image; None: there is none.
        steps: number of steps that the tokenizer was trained.
    """
    psnr = metrics["psnr"]
    lines = [
        f"tokenizer: PSNR {psnr:.1f} dB, SSIM {metrics['ssim']:.3f}, hue error {metrics['hue_error']:.0f} degrees, "
        f"saturation error {metrics['saturation_error']:.3f} on {metrics['images']:.0f} held-out images; "
        f"{metrics['codebook_used']:.0%} of {codebook_size} codebook entries used"
    ]
    if "reconstruction_distance" in metrics:
        lines.append(
            f"Frechet distance of the reconstructions (EfficientNet-Lite0): {metrics['reconstruction_distance']:.1f}; "
            "expect no smaller one of samples"
        )
    gain = psnr - metrics.get("patch_psnr", -np.inf)
    if "patch_psnr" in metrics:
        lines.append(
            f"k-means of raw patches with {num_tokens} tokens of {codebook_size}: {metrics['patch_psnr']:.1f} dB, "
            f"the tokenizer is {abs(gain):.1f} dB {'better' if gain >= 0 else 'worse'}"
        )
    longer = f"{steps} more steps (a larger --minutes)"
    if gain < CLEAR_GAIN_DB:
        lines.append(f"the tokenizer has hardly learned: it needs {longer} first")
    elif psnr < GOOD_PSNR_DB:
        finer = f"more tokens (--tokens {more_tokens}) or " if more_tokens else ""
        lines.append(f"the tokenizer limits what samples can look like: {finer}{longer}")
    else:
        lines.append("the tokenizer is good enough to train a generator; compare worst.png with reconstructions.png")
    has_many_tokens = metrics["images"] * num_tokens >= TOKENS_PER_ENTRY * codebook_size
    if has_many_tokens and metrics["codebook_used"] < LOW_USE:
        lines.append(f"most codebook entries are unused: a codebook of {codebook_size // 2} would do")
    return lines
