"""The files of a token store, `<name>.tokens/`, read and checked without torch, whose import alone takes 500 MB.

tokens.npy is (n, N) uint16, or uint32 for a codebook above 2^16; class_ids.npy is (n,) int32; meta.json holds the
fields of `StoreMeta`.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import numpy as np

from utils.errors import InputError
from utils.files.atomic import write_text
from utils.files.hashing import hash_of
from utils.files.json_file import read_json
from utils.files.text import same_letters
from utils.token_ids import MAX_CODEBOOK_SIZE, token_dtype

TOKENS_FILE, CLASS_IDS_FILE, META_FILE = "tokens.npy", "class_ids.npy", "meta.json"


@dataclass
class StoreMeta:
    image_seq_len: int  # N, tokens per image
    codebook_size: int  # V
    crops_per_image: int = 1  # consecutive samples that are crops of one image
    class_names: list[str] | None = None  # in the order of the class ids
    source: dict[str, int | str] | None = None  # of the jsonl with the same samples: name, size, mtime_ns, sha256
    num_skipped: int = 0  # bad lines of the jsonl, or unreadable images, that were left out
    grid_size: int | None = None  # edge of the square grid of tokens in raster order; None: not a square grid
    tokenizer_sha256: str | None = None  # of the tokenizer's weights; None: unknown (jsonl)
    source_sha256: str | None = None  # `fingerprint` of the images; None: unknown (jsonl)
    source_files: str | None = None  # `files_fingerprint` of the images; None: unknown
    shard_samples: list[int] | None = None  # images of each shard, in order; None: unknown (jsonl, folder)
    settings: dict[str, int | str | bool] | None = None  # of pre-tokenization, by config key
    sha256: dict[str, str] | None = None  # of the rows of tokens.npy and class_ids.npy, without their headers
    num_samples: int = 0  # n
    num_classes: int = 0  # number of class names, else largest class id + 1

    @property
    def fingerprint(self) -> str:
        """Equal for equal samples in equal order, independent of their origin."""
        shape = (self.num_samples, self.image_seq_len)
        return hash_of({"sha256": self.sha256, "shape": shape, "codebook_size": self.codebook_size})


def open_store(path: Path) -> tuple[StoreMeta, np.memmap, np.ndarray]:
    """Meta, codes (n, N) of `token_dtype`, memory-mapped, and class ids (n,) int32; raises InputError without a good
    store."""
    try:
        values = read_json(path / META_FILE)
        StoreMeta(**values)  # raises for unknown names
        meta = msgspec.convert(values, StoreMeta)
        codes = np.load(path / TOKENS_FILE, mmap_mode="r")
        class_ids = np.load(path / CLASS_IDS_FILE)
    except (OSError, ValueError, TypeError, EOFError, RecursionError, msgspec.ValidationError) as error:
        raise InputError(f"{path}: cannot be opened as a token store: {str(error).splitlines()[0]}") from error
    if meta.class_names is not None:
        meta.class_names = list(map(same_letters, meta.class_names))
    _check_array(path / TOKENS_FILE, codes, (meta.num_samples, meta.image_seq_len), token_dtype(meta.codebook_size))
    _check_array(path / CLASS_IDS_FILE, class_ids, (meta.num_samples,), np.dtype(np.int32))
    return meta, codes, class_ids


def _check_array(file: Path, array: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Rows are read as bytes from the file, so dtype and memory order must be as written."""
    if array.shape != shape:
        raise InputError(f"{file}: found shape {array.shape}, expected {shape} as in {META_FILE}")
    if array.dtype != dtype or not array.flags.c_contiguous:
        order = "" if array.flags.c_contiguous else " in Fortran order"
        raise InputError(f"{file}: found {array.dtype.str}{order}, expected {dtype.str} in C order")


def check_codebook_size(path: Path, codebook_size: int) -> None:
    if codebook_size > MAX_CODEBOOK_SIZE:
        raise InputError(f"{path}: codebook_size={codebook_size}, expected at most {MAX_CODEBOOK_SIZE}")


def write_meta(folder: Path, meta: StoreMeta) -> None:
    write_text(folder / META_FILE, json.dumps(asdict(meta), indent=1) + "\n")
