import numpy as np
import pytest
import torch

from utils.images import GRID_GAP, make_grid, to_uint8


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


def test_bytes_survive_both_ways() -> None:
    pixels = torch.arange(256, dtype=torch.float32).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    np.testing.assert_array_equal(to_uint8(pixels / 255, "round")[0, ..., 0].ravel(), np.arange(256))


def test_grid() -> None:
    images = np.stack([np.full((3, 4, 3), value, np.uint8) for value in (10, 20, 30)])
    grid = np.asarray(make_grid(images, columns=2))
    assert grid.shape == (2 * 3 + GRID_GAP, 2 * 4 + GRID_GAP, 3)
    assert (grid[:3, :4] == 10).all()
    assert (grid[:3, -4:] == 20).all()
    assert (grid[-3:, :4] == 30).all()
    assert (grid[-3:, -4:] == 255).all()
