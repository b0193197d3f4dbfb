"""Weights: reading finite tensors whatever saved them, loading that accepts no difference, a hash.

Read are the files of safetensors and torch.save under any name, and folders of shards with an index. What trainers put
around a state dict is taken off where that leaves no choice: one known name above it (`{"state_dict": ...}`) or one
known prefix on all keys (`module.`), said in one line. Everything else is an error.
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

from utils.errors import InputError
from utils.files.atomic import atomic_file
from utils.files.weight_formats import find_index, is_index, read_contents, shards_of

RECORD = "re-ar"  # name in a safetensors file's metadata
NAMED_IN_ERRORS = 3  # keys that an error message spells out
# Names above a state dict, and first parts of its keys: of DDP and AveragedModel (module), torch.compile (_orig_mod),
# Lightning (state_dict, model). No key of our own modules begins with one.
WRAPPERS = ("state_dict", "model", "module", "_orig_mod", "ema", "generator")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """Read tensors on the CPU, without running code; rank 0 prints a line if it took off a name or joined shards.

    Args:
        path: a file of safetensors or torch.save, whatever its suffix; an `*.index.json` of shards beside it, or a
            folder with one.

    Raises:
        InputError: there is nothing, or something else, which is named; more than one state dict; a prefix on some of
            the keys; a tensor with a value that is not finite in float32.
    """
    path = Path(path)
    if path.is_dir():
        path = find_index(path)
    if is_index(path):
        state, taken = _read_shards(path)
    else:
        state, taken = _read_file(path)
    while (name := _common_wrapper(state, path)) is not None:
        state = {key.removeprefix(f"{name}."): value for key, value in state.items()}
        taken.append(f"without the prefix {name!r} of all its keys")
    if taken and os.environ.get("RANK", "0") == "0":
        print(f"{path}: read {', '.join(taken)}")
    return state


def _read_shards(index: Path) -> tuple[dict[str, Tensor], list[str]]:
    state: dict[str, Tensor] = {}
    shards = shards_of(index)
    absent = [name for name in shards if not (index.parent / name).is_file()]
    if absent:
        raise InputError(f"{index}: {len(absent)} of {len(shards)} shards are not there ({_first(absent)})")
    for name, keys in shards.items():
        tensors, _ = _read_file(index.parent / name)
        if differing := sorted(keys ^ tensors.keys()):
            raise InputError(
                f"{index.parent / name}: found other keys than {index.name} says: {len(differing)} differ "
                f"({_first(differing)})"
            )
        state |= tensors
    return state, [f"from {len(shards)} shards"]


def _read_file(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """A flat dict of finite tensors, and what was around it."""
    contents, taken = read_contents(path), []
    if isinstance(contents, dict) and any(isinstance(value, dict) for value in contents.values()):
        nests = [key for key, value in contents.items() if key in WRAPPERS and isinstance(value, dict)]
        if len(nests) == 1:
            contents, taken = contents[nests[0]], [f"from under {nests[0]!r}"]
        elif nests:
            raise InputError(
                f"{path}: found a dict under each of {', '.join(map(repr, nests))}, expected one of them; "
                "save the state dict that you mean in a file of its own"
            )
    if not isinstance(contents, dict) or not all(map(_is_entry, contents.items())):
        raise InputError(
            f"{path}: expected a flat dict of tensors, by itself or under one of {', '.join(WRAPPERS)}, "
            f"found {_describe(contents)}"
        )
    _check_record(contents, path)
    _check_finite(contents, path)
    return contents, taken


def _is_entry(item: tuple[Any, Any]) -> bool:
    key, value = item
    plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
    return isinstance(key, str) and plain


def _check_finite(state: dict[str, Tensor], path: Path) -> None:
    bad = [key for key, value in state.items() if value.dtype in FLOATS and not _is_finite(value)]
    if bad:
        raise InputError(
            f"{path}: {len(bad)} of {len(state)} tensors hold NaN or infinity ({_first(bad)}), expected finite weights"
        )


def _is_finite(tensor: Tensor) -> bool:
    """In float32. Both extremes are NaN where one value is; finding them reads a tensor once and copies nothing."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.detach().aminmax()).float().isfinite().all())


def _common_wrapper(state: dict[str, Tensor], path: Path) -> str | None:
    """The known name with which all keys begin."""
    for name in WRAPPERS:
        begin = sum(key.startswith(f"{name}.") for key in state)
        if begin and begin < len(state):
            raise InputError(
                f"{path}: {begin} of {len(state)} keys begin with {name!r}, expected all or none; "
                "save the tensors that you mean in a file of their own"
            )
        if begin:
            return name
    return None


def save_weights(state_dict: dict[str, Tensor], path: Path, record: dict[str, Any] | None = None) -> None:
    """Write a safetensors file with the permissions that the umask gives (safetensors itself writes 0600).

    Args:
        record: what the weights were made from (JSON values); kept in the file's metadata with a hash of the tensors,
            which every reader compares.

    Raises:
        OSError: the disk is full or fails.
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
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)


def read_record(path: Path) -> dict[str, Any]:
    """The record that `save_weights` wrote into a file; empty if there is none."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get(RECORD, "{}"))
    except (OSError, SafetensorError, ValueError):  # `load_state_dict` says what is there instead
        return {}


def load_strict(module: nn.Module, state: dict[str, Tensor], source: object) -> None:
    """Copy `state` into `module`, in the module's precision; every key and shape must be equal, and floats be floats.

    Args:
        source: where the tensors come from, for the error message.

    Raises:
        InputError: missing, unexpected or misshapen entries or such of another type, counted and the first ones named.
    """
    check_fits(module, state, source)
    module.load_state_dict(state, strict=True)


def check_fits(module: nn.Module, state: dict[str, Tensor], source: object) -> None:
    """The check of `load_strict` alone."""
    own = module.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    misshapen = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    mistyped = [
        f"{key} {_name(state[key].dtype)} instead of {_name(own[key].dtype)}"
        for key in own
        if key in state and _kind(state[key].dtype) != _kind(own[key].dtype)
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    problems["of another type"] = mistyped
    if any(problems.values()):
        found = "; ".join(f"{len(names)} {kind} ({_first(names)})" for kind, names in problems.items() if names)
        raise InputError(f"{source}: does not fit {type(module).__name__} as configured: {found}")


def weights_sha256(module: nn.Module) -> str:
    """Hash of a module's names, shapes and values, whatever file they came from."""
    return tensors_sha256(module.state_dict())


def tensors_sha256(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(state.items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_record(state: dict[str, Tensor], path: Path) -> None:
    expected = read_record(path).get("tensors_sha256")
    if expected is not None and (found := tensors_sha256(state)) != expected:
        raise InputError(f"{path}: damaged, found tensors of sha256 {found[:12]}..., expected {expected[:12]}...")


def _first(names: list[str]) -> str:
    return ", ".join(names[:NAMED_IN_ERRORS]) + (", ..." if len(names) > NAMED_IN_ERRORS else "")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kind(dtype: torch.dtype) -> str:
    """Types of one kind are converted; all others must be equal: bool, complex, and floats that need a scale."""
    return "float" if dtype in FLOATS else "integer" if dtype in INTEGERS else _name(dtype)


def _describe(contents: object) -> str:
    if not isinstance(contents, dict):
        return f"a {type(contents).__name__}"
    key, value = next(item for item in contents.items() if not _is_entry(item))
    return f"a {type(value).__name__} under {key!r}"
