"""Checks of the arguments of the model, the sampler and the tokenizers.

`check_values` False: only shape and type are checked. Reading values waits for a GPU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

IMAGE_SLACK = 0.01  # beyond [0, 1]: rounding, and the overshoot of a resize


def checked_class_labels(class_labels: Tensor, num_classes: int, check_values: bool = True) -> Tensor:
    """Class labels (B,) as int64.

    Raises:
        ValueError: no integers, another shape, or a label that is not 0 to C - 1 or the null class C.
    """
    expected = f"(B,), integers from 0 to {num_classes - 1}, or {num_classes} for the null class"
    return _checked_integers("class_labels", class_labels, (), num_classes, expected, check_values)


def checked_codes(codes: Tensor, image_seq_len: int, largest: int, check_values: bool = True) -> Tensor:
    """Codes (B, N) as int64.

    Raises:
        ValueError: no integers, another shape, or a code that is not 0 to `largest`.
    """
    expected = f"(B, {image_seq_len}), integers from 0 to {largest}"
    return _checked_integers("codes", codes, (image_seq_len,), largest, expected, check_values)


def checked_orders(orders: Tensor, shape: Sequence[int], check_values: bool = True) -> Tensor:
    """Orders (B, N) as int64.

    Raises:
        ValueError: no integers, another shape, or a row that does not hold each of 0 to N - 1 once.
    """
    expected = f"{tuple(shape)}, each of 0 to {shape[1] - 1} once in every row"
    if not isinstance(orders, Tensor) or orders.shape != tuple(shape):
        raise ValueError(f"{_describe('orders', orders)}: expected {expected}")
    orders = _checked_integers("orders", orders, (shape[1],), shape[1] - 1, expected, check_values)
    if check_values:
        bad = (orders.sort(dim=1).values != torch.arange(shape[1], device=orders.device)).any(dim=1)
        if bad.any():
            raise ValueError(f"orders with {orders[bad][0].tolist()}: expected {expected}")
    return orders


def check_raster(orders: Tensor) -> None:
    """
    Raises:
        ValueError: orders (B, N) that are not raster, for a model trained in raster order.
    """
    other = orders != torch.arange(orders.shape[1], device=orders.device)
    if other.any():
        row, position = other.nonzero()[0].tolist()
        raise ValueError(
            f"image {row}: found code {orders[row, position].item()} before code {position}, expected raster order, as "
            "model.generator.order=raster; with it, conditioning codes must be the first codes of the image"
        )


def checked_conditioning(
    codes: Tensor | None, mask: Tensor | None, shape: tuple[int, int], codebook_size: int
) -> Tensor:
    """Codes (B, N) as int64 where the mask (B, N) is true, -1 elsewhere.

    Raises:
        ValueError: one without the other, another type or shape, or a code under the mask that is not 0 to V - 1.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(f"{_describe('conditioning_mask', mask)}: expected {shape}, bool")
    expected = f"{shape}, integers from 0 to {codebook_size - 1} where conditioning_mask is true"
    if not isinstance(codes, Tensor) or codes.shape != shape:
        raise ValueError(f"{_describe('conditioning_codes', codes)}: expected {expected}")
    codes = codes.masked_fill(~mask, 0)
    codes = _checked_integers("conditioning_codes", codes, shape[1:], codebook_size - 1, expected, check_values=True)
    return codes.masked_fill(~mask, -1)


def checked_uniforms(uniforms: Tensor, shape: tuple[int, int]) -> Tensor:
    """Uniforms as float32.

    Raises:
        ValueError: no floats, another shape, or a number outside [0, 1) in float32.
    """
    expected = f"{shape}, floats in [0, 1)"
    if not isinstance(uniforms, Tensor) or not uniforms.is_floating_point() or uniforms.shape != shape:
        raise ValueError(f"{_describe('uniforms', uniforms)}: expected {expected}")
    uniforms = uniforms.float()
    bad = ~((uniforms >= 0) & (uniforms < 1))  # NaN is bad
    if bad.any():
        raise ValueError(f"uniforms with {uniforms[bad][0].item()}: expected {expected}")
    return uniforms


def check_images(images: Tensor, resolution: int) -> None:
    """
    Raises:
        ValueError: no floats, another shape than (B, 3, H, W) with H = W = resolution, or values outside [0, 1].
    """
    shape = (3, resolution, resolution)
    expected = f"(B, 3, {resolution}, {resolution}), floats in [0, 1]"
    if not (isinstance(images, Tensor) and images.is_floating_point() and images.shape[1:] == shape):
        raise ValueError(f"{_describe('images', images)}: expected {expected}")
    if images.numel():
        lowest, highest = torch.stack(images.detach().aminmax()).tolist()
        if not (lowest >= -IMAGE_SLACK and highest <= 1 + IMAGE_SLACK):
            raise ValueError(f"images from {lowest:.4g} to {highest:.4g}: expected {expected}")


def _checked_integers(
    name: str, values: Tensor, shape: tuple[int, ...], largest: int, expected: str, check_values: bool
) -> Tensor:
    """Integers of shape (B, *shape) from 0 to `largest`."""
    if not isinstance(values, Tensor) or values.ndim != 1 + len(shape) or values.shape[1:] != shape:
        raise ValueError(f"{_describe(name, values)}: expected {expected}")
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"{_describe(name, values)}: expected {expected}")
    values = values.long()
    if check_values and (bad := (values < 0) | (values > largest)).any():
        raise ValueError(f"{name} with {values[bad][0].item()}: expected {expected}")
    return values


def _describe(name: str, value: object) -> str:
    if not isinstance(value, Tensor):
        return f"{name} in a {type(value).__name__}"
    return f"{name} of {value.dtype} and shape {tuple(value.shape)}"
