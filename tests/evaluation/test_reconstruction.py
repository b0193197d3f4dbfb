"""Metrics of reconstructions: SSIM against scikit-image, colour errors of known colours."""

import re

import numpy as np
import pytest
import torch

from evaluation.patch_baseline import PatchBaseline
from evaluation.reconstruction import ReconstructionMetrics, ssim
from evaluation.tokenizer_verdict import verdict, worst_first

METRICS = {
    "images": 100,
    "psnr": 23.0,
    "ssim": 0.8,
    "hue_error": 9.0,
    "saturation_error": 0.04,
    "codebook_used": 0.9,
    "patch_psnr": 21.0,
    "reconstruction_distance": 40.0,
}


def test_ssim() -> None:
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(20.0), indexing="ij")
    image = torch.stack([torch.sin(rows * 0.7) * 0.5 + 0.5, columns / 19, (rows + columns) / 34]).double()
    other = (image**1.3 + 0.1 * torch.cos(columns * 1.1)).clamp(0, 1)
    # skimage.metrics.structural_similarity(data_range=1, gaussian_weights=True, use_sample_covariance=False), mean over
    # channels and full windows
    assert ssim(image[None], other[None]).item() == pytest.approx(0.7630632953, abs=1e-5)
    assert ssim(image[None], image[None]).item() == pytest.approx(1)
    tiny = torch.rand(2, 3, 4, 4)
    assert ssim(tiny, tiny).tolist() == pytest.approx([1, 1])


def summary_of(color: list[float], reconstructed: list[float]) -> dict[str, float]:
    metrics = ReconstructionMetrics(codebook_size=2)
    images, others = (torch.tensor(values)[None, :, None, None].expand(1, 3, 8, 8) for values in (color, reconstructed))
    metrics.update(images, others, torch.zeros(1, 4, dtype=torch.int64))
    return metrics.summary()


@pytest.mark.parametrize(
    ("color", "reconstructed", "hue_error", "saturation_error"),
    [
        ([1.0, 0, 0], [1.0, 1, 0], 60, 0),  # red as yellow
        ([1.0, 0, 0.001], [1.0, 0.001, 0], 0, 0),  # across the angle 0
        ([0, 0, 1.0], [0.25, 0.25, 0.75], 0, 0.5),  # blue, half as saturated
        ([0.5, 0.5, 0.5], [0.5, 0.5, 0.7], 0, 0.2),  # grey has no hue
    ],
)
def test_color_errors(
    color: list[float], reconstructed: list[float], hue_error: float, saturation_error: float
) -> None:
    summary = summary_of(color, reconstructed)
    assert summary["hue_error"] == pytest.approx(hue_error, abs=0.2)
    assert summary["saturation_error"] == pytest.approx(saturation_error, abs=1e-2)


def test_the_baseline_reconstructs_patches_that_it_knows() -> None:
    images = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 3, 8, 8).clone()
    images[0, :, :4] = 0.5
    reconstructions, codes = PatchBaseline(images, grid_size=2, codebook_size=3).reconstruct(images)
    torch.testing.assert_close(reconstructions, images)
    assert codes.shape == (2, 4)
    assert codes[0, 0] == codes[0, 1] != codes[0, 2]


def test_the_worst_come_first() -> None:
    images = np.zeros((3, 2, 2, 3), np.uint8)
    others = images + np.array([5, 200, 0], np.uint8)[:, None, None, None]
    assert worst_first(images, others, 2).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {},
            r"limits what samples can look like: more tokens \(--tokens 256\) or 900 more steps \(a larger --minutes\)",
        ),
        ({"psnr": 21.2}, "0.2 dB better.*hardly learned: it needs 900 more steps"),
        ({"psnr": 20.0}, "1.0 dB worse.*hardly learned"),
        ({"psnr": 30.0}, "good enough"),
        ({"psnr": 30.0, "codebook_used": 0.2}, "a codebook of 256 would do"),
    ],
)
def test_verdict(changes: dict[str, float], expected: str) -> None:
    lines = "\n".join(verdict(METRICS | changes, num_tokens=64, more_tokens=256, codebook_size=512, steps=900))
    assert "hue error 9 degrees" in lines
    assert "Frechet distance of the reconstructions (EfficientNet-Lite0): 40.0" in lines
    assert re.search(expected, lines, flags=re.DOTALL), lines


def test_few_images_cannot_use_the_codebook() -> None:
    settings = {"num_tokens": 64, "more_tokens": 256, "codebook_size": 512, "steps": 900}
    found = [verdict(METRICS | {"images": images, "codebook_used": 0.2}, **settings)[-1] for images in (63, 64)]
    assert ["would do" in line for line in found] == [False, True]


def test_verdict_without_a_finer_grid() -> None:
    lines = verdict(METRICS, num_tokens=64, more_tokens=None, codebook_size=512, steps=900)
    assert "the tokenizer limits what samples can look like: 900 more steps (a larger --minutes)" in lines
