"""Tokenized images on disk: a memory map, which opens instantly for any number of images."""

import hashlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.batch_sampler import SampleIndex, as_sample_index
from data.codes.conversion import is_conversion, jsonl_to_store
from data.codes.jsonl import Sizes
from data.codes.store_files import CLASS_IDS_FILE, META_FILE, TOKENS_FILE, open_store
from utils.errors import InputError, environment_error, errors_name
from utils.files.hashing import range_sha256
from utils.files.lock import only_writer
from utils.processes import num_cpus


class TokenStore(Dataset):
    """A `<name>.tokens` folder: n samples of N codes and a class id.

    Attributes:
        codes: (n, N) uint16 or uint32, memory-mapped; for sequential reading.
        class_ids: (n,) int32.
        meta: sizes, class names and origin.
        workers: default number of processes that read it.

    Raises:
        InputError: no store there, or a damaged one.
    """

    workers = 2

    def __init__(self, path: Path) -> None:
        self.path = path
        self.meta, self.codes, self.class_ids = open_store(path)
        self._tokens = (path / TOKENS_FILE).open("rb", buffering=0)

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def fingerprint(self) -> str:
        """Equal for equal samples in equal order, independent of their origin."""
        return self.meta.fingerprint

    @property
    def class_names(self) -> list[str] | None:
        return self.meta.class_names

    def class_name(self, class_id: int) -> str:
        """The name, or the number if the store has no names."""
        return self.meta.class_names[class_id] if self.meta.class_names else str(class_id)

    def verify(self) -> None:
        """Read everything and compare it with the hashes of meta.json; raises InputError unless they are equal."""
        start, stop = self.codes.offset, self.codes.offset + self.codes.nbytes
        hashes = {
            TOKENS_FILE: range_sha256(self.path / TOKENS_FILE, start, stop, progress=True),
            CLASS_IDS_FILE: hashlib.sha256(self.class_ids.data).hexdigest(),
        }
        for file, found in hashes.items():
            expected = (self.meta.sha256 or {}).get(file, "none")
            if found != expected:
                raise InputError(
                    f"{self.path / file}: found sha256 {found[:12]}..., expected {expected[:12]}... as in "
                    f"{META_FILE}; delete the store and rebuild it"
                )

    def __getitem__(self, item: int | SampleIndex) -> dict[str, Tensor]:
        """One sample: as `__getitems__`, without the batch dimension."""
        return {key: values[0] for key, values in self.__getitems__([item]).items()}

    def __getitems__(self, items: Sequence[int | SampleIndex]) -> dict[str, Tensor]:
        """A batch: codes (B, N), class_labels (B,) and index (B,), all int64; DataLoader's collate_fn is `collate`."""
        index = np.array([as_sample_index(item).index for item in items], dtype=np.int64)
        rows = {"class_labels": self.class_ids[index], "codes": self._read_rows(index)}
        for name, limit in (("class_labels", self.meta.num_classes), ("codes", self.meta.codebook_size)):
            if rows[name].min() < 0 or rows[name].max() >= limit:
                raise InputError(
                    f"{self.path}: found {name} from {rows[name].min()} to {rows[name].max()} in samples such as "
                    f"{index[0]}, expected 0 to {limit - 1} as in {META_FILE}"
                )
        rows["index"] = index
        return {name: torch.from_numpy(values.astype(np.int64)) for name, values in rows.items()}

    def _read_rows(self, index: np.ndarray) -> np.ndarray:
        """Rows (B, N) in any order. Not through the memory map: its pages would count as memory of the process, which
        an error of the disk would kill (SIGBUS)."""
        rows = np.empty((len(index), self.codes.shape[1]), dtype=self.codes.dtype)
        with errors_name(self.path / TOKENS_FILE):
            for row, i in zip(rows, (index % len(self)).tolist(), strict=True):
                if os.preadv(self._tokens.fileno(), [row], self.codes.offset + i * row.nbytes) != row.nbytes:
                    raise InputError(f"{self.path / TOKENS_FILE}: ends before sample {i}; it was cut after opening")
        return rows

    @staticmethod
    def collate(batch: Any) -> dict[str, Tensor]:
        """`__getitems__` gives whole batches already."""
        return batch

    def __reduce__(self) -> tuple[type["TokenStore"], tuple[Path]]:
        return TokenStore, (self.path,)  # a pickled memory map would be a copy of all the data


def open_tokens(
    path: Path,
    codebook_size: int,
    image_seq_len: int,
    num_classes: int,
    max_bad_fraction: float = 0.0,
    key: str = "dataset.params.pretokenization",
) -> TokenStore:
    """Open codes for a model of these sizes: a `.tokens` store, or a `.jsonl`, which is converted once to a store.

    Args:
        max_bad_fraction: share of bad lines of a jsonl that may be left out, with a warning.
        key: config key of the path, for error messages.

    Raises:
        InputError: nothing there, too many bad lines, a damaged store or other sizes.
    """
    sizes = Sizes(codebook_size, image_seq_len, num_classes)
    if path.suffix not in (".tokens", ".jsonl"):
        raise InputError(f"{key}={path}: expected a .jsonl file or a .tokens store")
    store = TokenStore(path) if path.suffix == ".tokens" else _open_converted(path, sizes, max_bad_fraction, key)
    meta = store.meta
    for name in ("codebook_size", "image_seq_len"):
        if getattr(meta, name) != getattr(sizes, name):
            raise InputError(f"{store.path}: found {name}={getattr(meta, name)}, expected {getattr(sizes, name)}")
    if meta.num_classes > num_classes:
        raise InputError(f"{store.path}: found {meta.num_classes} classes, expected at most {num_classes}")
    return store


def _open_converted(jsonl: Path, sizes: Sizes, max_bad_fraction: float, key: str) -> TokenStore:
    store_path = jsonl.with_suffix(".tokens")
    if not jsonl.is_file():
        hint = f"; there is {store_path}" if store_path.is_dir() else ""
        raise InputError(f"{key}={jsonl}: no such file{hint}")
    if is_conversion(store_path, jsonl, sizes, max_bad_fraction):
        return TokenStore(store_path)
    try:
        with only_writer(store_path):
            if not is_conversion(store_path, jsonl, sizes, max_bad_fraction):  # another process may have finished it
                bad_lines = jsonl_to_store(jsonl, store_path, sizes, num_cpus(), max_bad_fraction)
                if bad_lines.count:
                    reasons = "; ".join(bad_lines.reasons)
                    warnings.warn(f"{jsonl}: left out {bad_lines.count} bad lines: {reasons}", stacklevel=4)
            return TokenStore(store_path)
    except OSError as error:
        raise InputError(
            f"{jsonl}: cannot be converted to {store_path} ({environment_error(error)}); to convert it elsewhere: "
            f"python scripts/convert_tokens.py {jsonl} FOLDER/{store_path.name} --codebook-size {sizes.codebook_size} "
            f"--image-seq-len {sizes.image_seq_len} --num-classes {sizes.num_classes}, then give "
            f"{key}=FOLDER/{store_path.name}"
        ) from error
