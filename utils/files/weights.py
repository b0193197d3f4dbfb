"""Weights: read finite tensors that any trainer saved, load them strictly, hash them.

Known wrappers of trainers are removed and reported in one line where that is unambiguous: one name above the state dict
(`{"state_dict": ...}`), or one prefix of all keys (`module.`). Anything else is an error.
"""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from utils.errors import InputError, first_of
from utils.files.atomic import atomic_file, set_permissions
from utils.files.weight_formats import is_index, read_contents, shards_of

RECORD = "re-ar"  # key in the metadata of a safetensors file
RECORD_TYPES = {
    "step": int,
    **dict.fromkeys(("tokenizer_sha256", "data", "code", "tensors_sha256"), str),
    "class_names": list,
    "untrained_classes": list,
    "config": dict,
}
# Names above a state dict and prefixes of its keys: DDP and AveragedModel (module), torch.compile (_orig_mod),
# Lightning (state_dict, model). No key of this project's modules begins with one.
WRAPPERS = ("state_dict", "model", "module", "_orig_mod", "ema", "generator")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """Read tensors on the CPU, without running code. Rank 0 prints which wrappers were removed.

    Args:
        path: a file of safetensors or torch.save with any suffix, or an `*.index.json` of shards next to it.

    Raises:
        InputError: no weights, several state dicts, a prefix of only some keys, a tensor that is not finite in float32,
            or a hash that differs from the one in the file.
    """
    path = Path(path)
    state, changes = _read_shards(path) if is_index(path) else _read_file(path)
    while (prefix := _common_prefix(state, path)) is not None:
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        changes.append(f"removed the prefix {prefix!r}")
    if changes and os.environ.get("RANK", "0") == "0":
        print(f"{path}: {', '.join(changes)}")
    return state


def _read_shards(index: Path) -> tuple[dict[str, Tensor], list[str]]:
    state: dict[str, Tensor] = {}
    shards = shards_of(index)
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        raise InputError(f"{index}: {len(missing)} of {len(shards)} shards are missing ({first_of(missing)})")
    for name, keys in shards.items():
        tensors, _ = _read_file(index.parent / name)
        if different := sorted(keys ^ tensors.keys()):
            raise InputError(
                f"{index.parent / name}: {len(different)} keys differ from those in {index.name} "
                f"({first_of(different)})"
            )
        state |= tensors
    return state, [f"joined {len(shards)} shards"]


def _read_file(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """A flat dict of finite tensors, and a line for a removed wrapper."""
    contents, changes = read_contents(path), []
    if isinstance(contents, dict) and any(isinstance(value, dict) for value in contents.values()):
        wrappers = [key for key in WRAPPERS if isinstance(contents.get(key), dict)]
        if len(wrappers) > 1:
            raise InputError(f"{path}: found state dicts under {', '.join(wrappers)}, expected one; save it alone")
        if wrappers:
            contents = contents[wrappers[0]]
            changes = [f"used the state dict under {wrappers[0]!r}"]
    if not isinstance(contents, dict) or not all(_is_entry(key, value) for key, value in contents.items()):
        raise InputError(
            f"{path}: found {_describe(contents)}, expected a flat dict of tensors, alone or under one of "
            f"{', '.join(WRAPPERS)}"
        )
    expected = read_record(path).get("tensors_sha256")
    if expected is not None and (found := tensors_sha256(contents)) != expected:
        raise InputError(f"{path}: damaged, found tensors of sha256 {found[:12]}..., expected {expected[:12]}...")
    bad = [key for key, value in contents.items() if value.dtype in FLOATS and not _is_finite(value)]
    if bad:
        raise InputError(f"{path}: {len(bad)} of {len(contents)} tensors hold NaN or infinity ({first_of(bad)})")
    return contents, changes


def _is_entry(key: Any, value: Any) -> bool:
    is_dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
    return isinstance(key, str) and is_dense


def _is_finite(tensor: Tensor) -> bool:
    """In float32. NaN propagates to both extremes; aminmax reads a tensor once and copies nothing."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.detach().aminmax()).float().isfinite().all())


def _common_prefix(state: dict[str, Tensor], path: Path) -> str | None:
    """The known prefix of all keys."""
    for prefix in (f"{name}." for name in WRAPPERS):
        count = sum(key.startswith(prefix) for key in state)
        if count and count < len(state):
            raise InputError(
                f"{path}: {count} of {len(state)} keys begin with {prefix!r}, expected all or none; save the tensors "
                "of one model alone"
            )
        if count:
            return prefix
    return None


def save_weights(state_dict: dict[str, Tensor], path: Path, record: dict[str, Any] | None = None) -> None:
    """Write a safetensors file with the permissions of the umask (safetensors itself writes 0600).

    `record` is the weights' provenance (JSON values), kept in the file's metadata with a hash of the tensors, which
    every reader compares. Raises OSError if the disk is full or fails.
    """
    state = {key: value.detach().contiguous().cpu() for key, value in state_dict.items()}
    metadata = None
    if record is not None:
        metadata = {RECORD: json.dumps(record | {"tensors_sha256": tensors_sha256(state)})}
    with atomic_file(path) as partial:
        try:
            save_file(state, partial, metadata)
        except SafetensorError as error:  # a full disk
            raise OSError(errno.EIO, str(error), str(path)) from error
        set_permissions(partial)


def read_record(path: Path) -> dict[str, Any]:
    """The record of `save_weights` in a file; empty without one. Raises InputError for values of types other
    than `RECORD_TYPES`, which a stranger's file may hold."""
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(RECORD, "{}")
    except (OSError, SafetensorError):  # `load_state_dict` reports them
        return {}
    try:
        record = json.loads(text)
        wrong = [key for key, type in RECORD_TYPES.items() if not isinstance(record.get(key), type | None)]
    except (ValueError, AttributeError, RecursionError):
        wrong = [RECORD]
    if wrong:
        raise InputError(f"{path}: damaged, found no valid {wrong[0]} in its metadata")
    return record


def load_strict(module: nn.Module, state: dict[str, Tensor], source: object) -> None:
    """Copy `state` into `module`, in the module's precision. Raises InputError, with counts and first names, unless all
    keys, shapes and kinds of dtypes are equal; `source` is for its message."""
    check_fits(module, state, source)
    module.load_state_dict(state, strict=True)


def check_fits(module: nn.Module, state: dict[str, Tensor], source: object) -> None:
    """The check of `load_strict`, without loading."""
    own = module.state_dict()
    pairs = [(key, state[key], own[key]) for key in own if key in state]
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {tuple(found.shape)} instead of {tuple(expected.shape)}"
            for key, found, expected in pairs
            if found.shape != expected.shape
        ],
        "of another type": [
            f"{key} {_name(found.dtype)} instead of {_name(expected.dtype)}"
            for key, found, expected in pairs
            if _kind(found.dtype) != _kind(expected.dtype)
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{len(names)} {problem} ({first_of(names)})" for problem, names in problems.items() if names)
        raise InputError(f"{source}: does not fit {type(module).__name__} as configured: {found}")


def weights_sha256(module: nn.Module) -> str:
    """Hash of a module's names, shapes and values, independent of the weights file."""
    return tensors_sha256(module.state_dict())


def tensors_sha256(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(state.items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kind(dtype: torch.dtype) -> str:
    """Types of one kind are converted; others (bool, complex, floats that need a scale) must be equal."""
    return "float" if dtype in FLOATS else "integer" if dtype in INTEGERS else _name(dtype)


def _describe(contents: object) -> str:
    if not isinstance(contents, dict):
        return f"a {type(contents).__name__}"
    key, value = next((key, value) for key, value in contents.items() if not _is_entry(key, value))
    return f"a {type(value).__name__} under {key!r}"
