"""Weight files: reading without running code from them, loading that accepts no difference, a hash."""

import errno
import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from utils.errors import InputError
from utils.files.atomic import complete_file

RECORD = "re-ar"  # name in a safetensors file's metadata
NAMED_IN_ERRORS = 3  # keys that an error message spells out


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a `.safetensors` file or of a `.bin` that torch.save wrote, on the CPU.

    Raises:
        InputError: a missing file, another suffix, a damaged file, or a pickle that holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such weights file")
    if path.suffix not in (".bin", ".safetensors"):
        raise InputError(f"{path}: found suffix {path.suffix!r}, expected .bin or .safetensors")
    try:
        if path.suffix == ".safetensors":
            return _checked(load_file(path), path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise InputError(f"{path}: not a complete safetensors file: {error}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(
            f"{path}: refused, a damaged file or a pickle of more than tensors; expected a state dict from torch.save"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path}: expected a flat dict of tensors, found {_describe(state)}")
    return state


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
    with complete_file(path) as partial:
        try:
            save_file(state, partial, metadata)
        except SafetensorError as error:  # a full disk
            raise OSError(errno.EIO, str(error), str(path)) from error
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)


def read_record(path: Path) -> dict[str, Any]:
    """The record that `save_weights` wrote into a file; empty if there is none.

    Raises:
        InputError: no such file, or no complete safetensors file.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such weights file")
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get(RECORD, "{}"))
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{path}: not a complete safetensors file: {error}") from error


def load_strict(module: nn.Module, state: dict[str, Tensor], source: object) -> None:
    """Copy `state` into `module`, in the module's precision; every key and shape must be equal.

    Args:
        source: where the tensors come from, for the error message.

    Raises:
        InputError: missing, unexpected or misshapen entries, counted and the first ones named.
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
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
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


def _checked(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors, if they are those that the file's record tells."""
    expected = read_record(path).get("tensors_sha256")
    if expected is not None and (found := tensors_sha256(state)) != expected:
        raise InputError(f"{path}: damaged, found tensors of sha256 {found[:12]}..., expected {expected[:12]}...")
    return state


def _first(names: list[str]) -> str:
    return ", ".join(names[:NAMED_IN_ERRORS]) + (", ..." if len(names) > NAMED_IN_ERRORS else "")


def _describe(state: object) -> str:
    if not isinstance(state, dict):
        return f"a {type(state).__name__}"
    key, value = next((key, value) for key, value in state.items() if not isinstance(value, Tensor))
    return f"a {type(value).__name__} under {key!r}"
