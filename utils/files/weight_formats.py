"""From a file to the tensors in it: what wrote it is read from its bytes, not from its name, and no code in it is run.

What is not a file of weights is named for what it is: a pointer, a web page, a file that was cut off, another format.
"""

import json
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from utils.errors import InputError

HEAD_BYTES = 512
SHOWN_BYTES = 40  # of an unknown file, in the error line
EXPECTED = "expected tensors saved by safetensors or torch.save"
UNPACK = "a compressed file or an archive; unpack it first"
FIRST_BYTES = {
    b"version https://git-lfs": "a Git LFS pointer instead of the file; `git lfs pull` fetches that",
    b"/annex/objects/": "a git-annex pointer instead of the file; `git annex get` fetches that",
    b"<": "a web page (HTML or XML); download the file itself, on the Hub from /resolve/ instead of /blob/",
    b"{": "JSON text, such as a server's answer or a config",
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 file, such as Keras writes",
    b"\x93NUMPY": "a NumPy array",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"\x1f\x8b": UNPACK,
    b"BZh": UNPACK,
    b"\xfd7zXZ": UNPACK,
    b"\x28\xb5\x2f\xfd": UNPACK,
    b"7z\xbc\xaf": UNPACK,
    b"Rar!": UNPACK,
}
INDEX_SUFFIX = ".index.json"


def read_contents(path: Path) -> Any:
    """What one file of safetensors or torch.save holds, on the CPU.

    Raises:
        InputError: there is no such file, or it is damaged, refused or of another format, named for what it is.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such weights file")
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        if head[5:9] == b"\0\0\0{":  # the length of a JSON header, in 8 bytes, and its beginning
            return load_file(path)
        if head.startswith(b"PK\x03\x04"):
            _check_zip(path)
        elif head[:1] != b"\x80":  # not a pickle
            raise InputError(f"{path}: found {_other_format(head)}; {EXPECTED}")
        with path.open("rb") as file, warnings.catch_warnings():  # of a path it would heed the suffix
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise InputError(f"{path}: not a complete safetensors file{_missing_bytes(path, head)}: {error}") from error
    except InputError:
        raise
    except Exception as error:  # the unpickler raises errors of many kinds where bytes are damaged
        raise InputError(f"{path}: {_pickle_problem(error)}") from error


def is_index(path: Path) -> bool:
    return path.name.endswith(INDEX_SUFFIX)


def find_index(folder: Path) -> Path:
    """The one `*.index.json` in a folder of shards.

    Raises:
        InputError: there is none, or several.
    """
    found = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    if len(found) == 1:
        return found[0]
    if any(folder.glob("*.distcp")):
        advice = "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch` joins its .distcp files"
    else:
        advice = f"found {', '.join(path.name for path in found) or 'no index'}; name a weights file"
    raise InputError(f"{folder}: a folder, expected one *{INDEX_SUFFIX} in it: {advice}")


def shards_of(index: Path) -> dict[str, set[str]]:
    """File names beside an index, each with the keys that the index promises of it.

    Raises:
        InputError: not an index, or one that points elsewhere.
    """
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files = {name: {key for key, file in weight_map.items() if file == name} for name in weight_map.values()}
        plain = all(Path(name).name == name for name in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: not an index of shards: {type(error).__name__}: {error}") from error
    if not files or not plain:
        raise InputError(f"{index}: found weight_map to {sorted(files)}, expected names of files beside it")
    return files


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise InputError(f"{path}: cut off or damaged: a file of torch.save without its end") from error
    if any(name.endswith("/constants.pkl") for name in names):
        raise InputError(f"{path}: found a TorchScript archive, which holds code; {EXPECTED}")
    if not any(name.endswith("/data.pkl") for name in names):
        kind = "a NumPy npz" if names and all(name.endswith(".npy") for name in names) else "a zip archive"
        raise InputError(f"{path}: found {kind}; {EXPECTED}")


def _other_format(head: bytes) -> str:
    if not head:
        return "an empty file"
    if head[257:262] == b"ustar":
        return UNPACK
    text = head.lstrip().removeprefix(b"\xef\xbb\xbf")
    known = next((name for start, name in FIRST_BYTES.items() if text.startswith(start)), None)
    if known is not None:
        return known
    shown = head[:SHOWN_BYTES]
    return f"text that begins with {shown.decode()!r}" if _is_text(shown) else f"a file that begins with {shown!r}"


def _is_text(shown: bytes) -> bool:
    return all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in shown)


def _missing_bytes(path: Path, head: bytes) -> str:
    """How much of a safetensors file is there, where its header tells."""
    length, size = int.from_bytes(head[:8], "little"), path.stat().st_size
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(min(8 + length, size))[8:])
        expected = 8 + length + max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        expected = 8 + length
    return f", {size} bytes, expected {'' if size > expected else 'at least '}{expected}" if size != expected else ""


def _pickle_problem(error: Exception) -> str:
    text = str(error)
    if isinstance(error, EOFError) or "truncated" in text or "EOF" in text:
        return "cut off or damaged: a file of torch.save without its end"
    if found := re.search(r"(?:GLOBAL|class) ([\w.]+)", text):
        return (
            f"refused, a pickle that holds other objects than tensors ({found[1]}), which may run code; if you trust "
            "it, load it where it was made and save the tensors alone"
        )
    return f"refused, a damaged file or a pickle that torch.save did not write; {EXPECTED}"
