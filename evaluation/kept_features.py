"""Features of a reference, kept next to it so that they are computed once.

`<reference>.<encoder>.features.safetensors` has the pool features and the moments of all features; the record in it
states what they depend on. A file that depends on anything else is replaced.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from evaluation.collect import FeatureSums
from utils.errors import InputError
from utils.files.weights import load_state_dict, read_record, save_weights

MOMENTS = ("pool", "spatial")
PARTS = ("count", "total", "outer")


def is_kept(path: Path, provenance: dict[str, Any]) -> bool:
    """Whether the file is there and has features of this provenance."""
    try:
        return path.is_file() and read_record(path).get("provenance") == provenance
    except InputError:  # a damaged file
        return False


def keep(path: Path, sums: FeatureSums, provenance: dict[str, Any]) -> None:
    """Write the file; where that fails, print a line: the features are only for speed."""
    assert sums.features is not None
    tensors = {"features": sums.features}
    for name in MOMENTS:
        if (moments := getattr(sums, name)) is not None:
            tensors |= {f"{name}.{part}": getattr(moments, part) for part in PARTS}
    try:
        save_weights(tensors, path, {"provenance": provenance})
    except OSError as error:
        print(f"{path}: the features of the reference are not kept: {error}", file=sys.stderr)


def read_kept(path: Path, sums: FeatureSums, device: torch.device) -> None:
    """Fill `sums`, on this device; raises InputError for a damaged file."""
    tensors = load_state_dict(path)
    sums.features = tensors["features"]
    for name in MOMENTS:
        if (moments := getattr(sums, name)) is not None:
            for part in PARTS:
                setattr(moments, part, tensors[f"{name}.{part}"].to(device))
