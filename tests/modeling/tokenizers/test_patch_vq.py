"""The tokenizer of patches starts from principal components and, with k-means of latents, from k-means of patches."""

from dataclasses import replace

import pytest
import torch

from evaluation.patch_baseline import PatchBaseline
from modeling.tokenizers.patch_vq import PatchVQ
from utils.errors import InputError
from utils.kmeans import k_means
from utils.schema import ConvTokenizerConfig

SIZES = ConvTokenizerConfig(
    codebook_size=32, token_size=12, resolution=16, hidden_channels=24, channel_mult=[1, 1], num_res_blocks=1
)


def made_up_images(count: int) -> torch.Tensor:
    """Smooth images (B, 3, 16, 16) in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    return torch.nn.functional.interpolate(
        torch.rand(count, 3, 5, 5, generator=generator), size=16, mode="bicubic"
    ).clamp(0, 1)


def test_all_components_lose_nothing() -> None:
    """Before quantization."""
    tokenizer, images = PatchVQ(SIZES), made_up_images(40)
    tokenizer.init_from_images(images)
    with torch.no_grad():
        reconstructions = tokenizer.decode_grid(tokenizer.encode_grid(images))
    torch.testing.assert_close(reconstructions, images, atol=1e-5, rtol=0)


def test_few_components_are_the_best_ones() -> None:
    images = made_up_images(40)
    errors = {}
    for count in (1, 3, 6):
        tokenizer = PatchVQ(replace(SIZES, token_size=count))
        tokenizer.init_from_images(images)
        with torch.no_grad():
            errors[count] = (tokenizer.decode_grid(tokenizer.encode_grid(images)) - images).square().sum().item()
    patches = torch.nn.functional.unfold(images, 2, stride=2).mT.flatten(0, 1).double()
    left_over = torch.linalg.svdvals(patches - patches.mean(dim=0)).square()
    for count, error in errors.items():
        assert error == pytest.approx(left_over[count:].sum().item(), rel=1e-3)


def test_training_starts_where_k_means_of_patches_ends() -> None:
    images = made_up_images(60)
    tokenizer = PatchVQ(SIZES)
    tokenizer.init_from_images(images)
    with torch.no_grad():
        latents = tokenizer.encode_latents(images).flatten(0, 1)
        tokenizer.set_vectors(torch.arange(32), k_means(latents, 32, seed=0))
        error = (tokenizer.decode(tokenizer.encode(images)) - images).square().mean()
    baseline, _ = PatchBaseline(images, grid_size=8, codebook_size=32).reconstruct(images)
    assert error.item() == pytest.approx((baseline - images).square().mean().item(), rel=0.1)


def test_other_multiples_are_refused() -> None:
    with pytest.raises(InputError, match=r"channel_mult=\[1, 2\]: expected a 1 for each level of patch_vq"):
        PatchVQ(replace(SIZES, channel_mult=[1, 2]))
