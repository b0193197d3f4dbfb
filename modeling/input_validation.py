"""What callers may pass to the model, the sampler and the tokenizers: each check names the value found and expected.

Values are looked at where that costs nothing or comes once per batch; on a GPU it waits for the tensor.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

IMAGE_SLACK = 0.01  # beyond [0, 1]: rounding; a resize that overshoots by more wants a clamp


def checked_class_labels(class_labels: Tensor, num_classes: int, look: bool = True) -> Tensor:
    """Class labels (B,) as int64.

    Args:
        look: at the values; False: at shape and type alone.

    Raises:
        ValueError: no integers, another shape, or a label that is not 0 to C - 1 or the null class C.
    """
    expected = f"(B,), integers from 0 to {num_classes - 1}, or {num_classes} for the null class"
    return _checked_integers("class_labels", class_labels, (), num_classes, expected, look)


def checked_codes(codes: Tensor, image_seq_len: int, largest: int, look: bool = True) -> Tensor:
    """Codes (B, N) as int64; arguments and errors as for the labels.

    Args:
        largest: the largest code that is allowed.
    """
    expected = f"(B, {image_seq_len}), integers from 0 to {largest}"
    return _checked_integers("codes", codes, (image_seq_len,), largest, expected, look)


def checked_orders(orders: Tensor, shape: Sequence[int], look: bool = True) -> Tensor:
    """Orders (B, N) as int64; `look` as for the labels.

    Raises:
        ValueError: no integers, another shape, or a row that does not hold each of 0 to N - 1 once.
    """
    expected = f"{tuple(shape)}, each of 0 to {shape[1] - 1} once in every row"
    if not isinstance(orders, Tensor) or orders.shape != tuple(shape):
        raise ValueError(f"{_describe('orders', orders)}: expected {expected}")
    orders = _checked_integers("orders", orders, (shape[1],), shape[1] - 1, expected, look)
    if look and (bad := (orders.sort(dim=1).values != torch.arange(shape[1], device=orders.device)).any(dim=1)).any():
        raise ValueError(f"orders with {orders[bad][0].tolist()}: expected {expected}")
    return orders


def check_raster(orders: Tensor) -> None:
    """
    Raises:
        ValueError: orders (B, N) that are not raster, for a model that knows no other one.
    """
    if (other := orders != torch.arange(orders.shape[1], device=orders.device)).any():
        row, place = other.nonzero()[0].tolist()
        raise ValueError(
            f"code {orders[row, place].item()} before code {place} in image {row}: expected raster order, known codes "
            "included, as model.generator.order=raster; models trained otherwise take any order"
        )


def checked_known(
    known_codes: Tensor | None, known_mask: Tensor | None, shape: tuple[int, int], codebook_size: int
) -> Tensor:
    """Codes (B, N) as int64 where the mask (B, N) is true, -1 elsewhere.

    Raises:
        ValueError: one without the other, other types or shapes, or a known code that is not 0 to V - 1.
    """
    if not isinstance(known_mask, Tensor) or known_mask.dtype != torch.bool or known_mask.shape != shape:
        raise ValueError(f"{_describe('known_mask', known_mask)}: expected {shape}, bool")
    expected = f"{shape}, integers from 0 to {codebook_size - 1} where they are known"
    if not isinstance(known_codes, Tensor) or known_codes.shape != shape:
        raise ValueError(f"{_describe('known_codes', known_codes)}: expected {expected}")
    codes = known_codes.masked_fill(~known_mask, 0)
    codes = _checked_integers("known_codes", codes, shape[1:], codebook_size - 1, expected, look=True)
    return codes.masked_fill(~known_mask, -1)


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
    name: str, values: Tensor, shape: tuple[int, ...], largest: int, expected: str, look: bool
) -> Tensor:
    """Integers of shape (B, *shape) from 0 to `largest`."""
    if not isinstance(values, Tensor) or values.ndim != 1 + len(shape) or values.shape[1:] != shape:
        raise ValueError(f"{_describe(name, values)}: expected {expected}")
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(f"{_describe(name, values)}: expected {expected}")
    values = values.long()
    if look and (bad := (values < 0) | (values > largest)).any():
        raise ValueError(f"{name} with {values[bad][0].item()}: expected {expected}")
    return values


def _describe(name: str, value: object) -> str:
    if not isinstance(value, Tensor):
        return f"{name} in a {type(value).__name__}"
    return f"{name} of {value.dtype} and shape {tuple(value.shape)}"
