"""Read one file of safetensors or torch.save. The content decides, not the suffix; no code in a file is run."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from utils.errors import InputError, errors_name

EXPECTED = "expected a file of safetensors or torch.save"
INDEX_SUFFIX = ".index.json"
HEAD_BYTES = 40


def read_contents(path: Path) -> Any:
    """The object in a weights file, on the CPU; raises InputError if the file is missing, damaged, refused or of
    another format."""
    if not path.is_file():
        problem = "found a folder, expected a weights file" if path.is_dir() else "no such weights file"
        raise InputError(f"{path}: {problem}")
    with errors_name(path), path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if head[5:9] == b"\0\0\0{":  # safetensors: the size of the header in 8 bytes, then its JSON
        try:
            with errors_name(path):
                return load_file(path)
        except SafetensorError as error:
            raise InputError(f"{path}: damaged or cut off safetensors file: {error}") from error
    if not head.startswith((b"PK\x03\x04", b"\x80")):  # torch.save: a zip archive, before torch 1.6 a pickle
        raise InputError(f"{path}: found {_describe(head)}; {EXPECTED}")
    try:
        # Given a path, torch.load would look at the suffix.
        with errors_name(path), path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # damaged bytes raise errors of many types
        problem = f"refused: damaged, cut off or not written by torch.save; {EXPECTED}"
        if found := re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error)):
            problem = (
                f"refused: found {found[1]}, expected tensors, since other objects can run code; save the tensors alone"
            )
        raise InputError(f"{path}: {problem}") from error


def is_index(path: Path) -> bool:
    return path.name.endswith(INDEX_SUFFIX)


def shards_of(index: Path) -> dict[str, set[str]]:
    """Names of the files next to an index, each with its keys; raises InputError unless it is a valid index."""
    shards: dict[str, set[str]] = {}
    try:
        for key, name in json.loads(index.read_bytes())["weight_map"].items():
            shards.setdefault(name, set()).add(key)
        are_names = all(Path(name).name == name for name in shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: not an index of shards: {type(error).__name__}: {error}") from error
    if not shards or not are_names:
        raise InputError(f"{index}: found weight_map to {sorted(shards)}, expected names of files next to it")
    return shards


def _describe(head: bytes) -> str:
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (`git lfs pull` downloads the file)"
    if head.lstrip().startswith(b"<"):
        return "a web page (the Hugging Face Hub has the file itself under /resolve/, not /blob/)"
    return f"a file that begins with {head!r}" if head else "an empty file"
