import pytest
import torch
import torch.nn.functional as F

from modeling.perceptual import COMPARED_BLOCKS, PerceptualDistance


@pytest.fixture(scope="module")
def perceptual() -> PerceptualDistance:
    return PerceptualDistance()


def test_distance_grows_with_blur(perceptual: PerceptualDistance) -> None:
    torch.manual_seed(0)
    images = F.interpolate(torch.rand(2, 3, 16, 16), scale_factor=4, mode="bicubic").clamp(0, 1)
    light, heavy = (F.avg_pool2d(images, size, stride=1, padding=size // 2) for size in (3, 9))
    assert perceptual(images, images) == 0
    assert 0 < perceptual(light, images) < perceptual(heavy, images) < 4


def test_gradients_reach_the_images_alone(perceptual: PerceptualDistance) -> None:
    images, targets = torch.rand(2, 1, 3, 32, 32).requires_grad_().unbind()
    images.retain_grad()
    targets.retain_grad()
    perceptual(images, targets).backward()
    assert images.grad.abs().max() > 0
    assert targets.grad is None
    assert all(parameter.grad is None for parameter in perceptual.parameters())


def test_maps(perceptual: PerceptualDistance) -> None:
    maps = perceptual.features(torch.rand(2, 3, 64, 64))
    assert [x.shape[2] for x in maps] == [64, 32, 16, 8, 4]  # of an image enlarged to 128 pixels
    assert len(maps) == len(COMPARED_BLOCKS)
    for x in maps:
        torch.testing.assert_close(x.norm(dim=1), torch.ones_like(x[:, 0]))
