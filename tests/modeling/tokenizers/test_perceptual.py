import pytest
import torch
import torch.nn.functional as F

from modeling.tokenizers.perceptual import COMPARED_BLOCKS, PerceptualFeatures, perceptual_distance


@pytest.fixture(scope="module")
def features() -> PerceptualFeatures:
    return PerceptualFeatures()


def test_distance_grows_with_blur(features: PerceptualFeatures) -> None:
    torch.manual_seed(0)
    images = F.interpolate(torch.rand(2, 3, 16, 16), scale_factor=4, mode="bicubic").clamp(0, 1)
    blurred = [F.avg_pool2d(images, size, stride=1, padding=size // 2) for size in (1, 3, 9)]
    none, light, heavy = (perceptual_distance(features(x), features(images)) for x in blurred)
    assert none == 0
    assert 0 < light < heavy < 4


def test_gradients_reach_the_images_alone(features: PerceptualFeatures) -> None:
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    perceptual_distance(features(images), features(torch.rand(1, 3, 32, 32))).backward()
    assert images.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in features.parameters())


def test_maps(features: PerceptualFeatures) -> None:
    maps = features(torch.rand(2, 3, 64, 64))
    assert [x.shape[2] for x in maps] == [64, 32, 16, 8, 4]  # of an image enlarged to 128 pixels
    assert [x.shape[1] for x in maps] == features.feature_channels
    assert len(maps) == len(COMPARED_BLOCKS)
    for x in maps:
        torch.testing.assert_close(x.norm(dim=1), torch.ones_like(x[:, 0]))
