"""Frozen image encoders by name: `efficientnet_lite0`, or `timm:NAME[:FILE]` for any model of timm.

A new kind of encoder is a class like `EfficientNetLite0` and a branch here. timm is imported where its models are asked
for: that takes seconds.
"""

from modeling.encoders.encoder import FrozenEncoder
from utils.errors import InputError

EXPECTED = "expected efficientnet_lite0 or timm:NAME[:FILE]"


def is_encoder_name(name: str) -> bool:
    kind, _, model = name.partition(":")
    return name == "efficientnet_lite0" or (kind == "timm" and bool(model))


def open_encoder(name: str, grid_size: int | None = None) -> FrozenEncoder:
    """The encoder on the CPU, frozen.

    Args:
        name: of a timm model, NAME is one that `timm.list_models` knows, such as vit_base_patch14_dinov2.lvd142m, and
            FILE its weights: a path or hf://OWNER/REPO/FILE. Without FILE they are those that timm names on the Hub.
        grid_size: g of the patch features; None: only features of whole images are asked for.

    Raises:
        InputError: an unknown name, a missing package, or missing or wrong weights.
    """
    if not is_encoder_name(name):
        raise InputError(f"encoder {name!r}: {EXPECTED}")
    try:
        if name == "efficientnet_lite0":
            from modeling.encoders.efficientnet_lite0 import EfficientNetLite0

            return EfficientNetLite0(grid_size)
        from modeling.encoders.timm_encoder import TimmEncoder

        _, model, *file = name.split(":", 2)
        return TimmEncoder(model, file[0] if file else None, grid_size)
    except ImportError as error:
        raise InputError(f"encoder {name}: the package {error.name} is missing; install it with pip") from error
