import numpy as np
import pytest
import torch

from utils.images import GRID_GAP, make_grid, to_float, to_uint8


def test_rules() -> None:
    values = torch.tensor([-0.1, 0.0, 0.999, 1.0, 1.1, 127.6 / 255])
    images = values.reshape(2, 3, 1, 1)
    assert to_uint8(images).ravel().tolist() == [0, 0, 254, 255, 255, 127]
    assert to_uint8(images, "round").ravel().tolist() == [0, 0, 255, 255, 255, 128]
    with pytest.raises(ValueError, match="'floor': expected truncate or round"):
        to_uint8(images, "floor")


def test_channels_come_last() -> None:
    images = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5) / 255
    bytes_ = to_uint8(images, "round")
    assert bytes_.shape == (2, 4, 5, 3)
    assert bytes_.dtype == np.uint8
    np.testing.assert_array_equal(bytes_, np.arange(120).reshape(2, 3, 4, 5).transpose(0, 2, 3, 1))


def test_all_bytes_become_the_nearest_floats_and_survive_both_ways() -> None:
    pixels = (torch.arange(256 * 3) % 256).to(torch.uint8).reshape(1, 16, 16, 3)
    images = to_float(pixels)
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    exact = pixels.double() / 255
    assert torch.equal(images, exact.float().permute(0, 3, 1, 2))
    assert torch.equal(images, (pixels.permute(0, 3, 1, 2).float() / 255).contiguous())  # as on a CPU
    assert not torch.equal(images, pixels.permute(0, 3, 1, 2).float() * (1 / torch.tensor(255.0)))  # as on a GPU
    np.testing.assert_array_equal(to_uint8(images, "round"), pixels)


def test_grid() -> None:
    images = np.stack([np.full((3, 4, 3), value, np.uint8) for value in (10, 20, 30)])
    grid = np.asarray(make_grid(images, columns=2))
    assert grid.shape == (2 * 3 + GRID_GAP, 2 * 4 + GRID_GAP, 3)
    assert (grid[:3, :4] == 10).all()
    assert (grid[:3, -4:] == 20).all()
    assert (grid[-3:, :4] == 30).all()
    assert (grid[-3:, -4:] == 255).all()
