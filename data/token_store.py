"""Tokenized images on disk: a memory map that opens at once, however many images there are."""

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from data.batch_sampler import Draw, as_draw
from data.conversion import describe_source, jsonl_to_store, store_to_jsonl
from data.jsonl import Sizes
from data.token_writer import CLASS_IDS_FILE, META_FILE, TOKENS_FILE, StoreMeta, write_meta
from utils.errors import InputError
from utils.manifest import hash_of
from utils.processes import num_cpus

ROWS_PER_READ = 65_536


class TokenStore(Dataset):
    """A `<name>.tokens` folder: n samples of N codes and a class id.

    Attributes:
        codes: (n, N) uint16, mapped from disk.
        class_ids: (n,) int32, mapped from disk.
        meta: sizes, class names and origin.

    Raises:
        InputError: no store there, or a damaged one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.meta = StoreMeta(**json.loads((path / META_FILE).read_text()))
            self.codes = np.load(path / TOKENS_FILE, mmap_mode="r")
            self.class_ids = np.load(path / CLASS_IDS_FILE, mmap_mode="r")
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path}: cannot be opened as a token store: {str(error).splitlines()[0]}") from error
        expected = (self.meta.num_samples, self.meta.image_seq_len)
        for file, found, shape in (
            (TOKENS_FILE, self.codes.shape, expected),
            (CLASS_IDS_FILE, self.class_ids.shape, expected[:1]),
        ):
            if found != shape:
                raise InputError(f"{path / file}: found shape {found}, expected {shape} as in {META_FILE}")

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def fingerprint(self) -> str:
        """Equal for equal samples in equal order, wherever they came from."""
        return hash_of(
            {"sha256": self.meta.sha256, "shape": self.codes.shape, "codebook_size": self.meta.codebook_size}
        )

    def verify(self) -> None:
        """Read everything, with a progress bar, and compare it with the hashes of meta.json.

        Raises:
            InputError: codes or class ids were changed after they were written, or there is no hash to compare with.
        """
        for file, rows in ((TOKENS_FILE, self.codes), (CLASS_IDS_FILE, self.class_ids)):
            digest = hashlib.sha256()
            for first in tqdm(range(0, len(rows), ROWS_PER_READ), desc=f"verifying {file}", delay=2):
                digest.update(np.ascontiguousarray(rows[first : first + ROWS_PER_READ]))
            expected = (self.meta.sha256 or {}).get(file, "none")
            if digest.hexdigest() != expected:
                raise InputError(
                    f"{self.path / file}: found sha256 {digest.hexdigest()[:12]}..., expected {expected[:12]}... as in "
                    f"{META_FILE}; delete the store and make it again"
                )

    def __getitem__(self, item: int | Draw) -> dict[str, Tensor]:
        """One sample: what `__getitems__` gives, without the batch dimension."""
        return {key: values[0] for key, values in self.__getitems__([item]).items()}

    def __getitems__(self, items: Sequence[int | Draw]) -> dict[str, Tensor]:
        """A batch, asked for by a DataLoader whose collate_fn is `collate`.

        Returns:
            codes: (B, N) int64; class_labels: (B,) int64; index: (B,) int64.
        """
        index = np.array([as_draw(item).index for item in items], dtype=np.int64)
        arrays = {"codes": self.codes[index], "class_labels": self.class_ids[index], "index": index}
        return {key: torch.from_numpy(array.astype(np.int64)) for key, array in arrays.items()}

    @staticmethod
    def collate(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`__getitems__` gives whole batches already."""
        return batch

    def __reduce__(self) -> tuple[type["TokenStore"], tuple[Path]]:
        return TokenStore, (self.path,)  # a pickled memory map would be a copy of all the data


def open_tokens(
    path: Path, codebook_size: int, image_seq_len: int, num_classes: int, max_bad_fraction: float = 0.0
) -> TokenStore:
    """Open codes for a model of these sizes: a `.tokens` store, or a `.jsonl` that is converted once beside itself.

    Args:
        max_bad_fraction: bad lines of a jsonl up to this share are left out, with a warning that counts them.

    Raises:
        InputError: nothing there, bad lines, a damaged store or one of other sizes; the message names file and value.
    """
    sizes = Sizes(codebook_size, image_seq_len, num_classes)
    if path.suffix not in (".tokens", ".jsonl"):
        raise InputError(f"dataset.params.pretokenization={path}: expected a .jsonl file or a .tokens store")
    store = TokenStore(path) if path.suffix == ".tokens" else _open_converted(path, sizes, max_bad_fraction)
    meta = store.meta
    for name in ("codebook_size", "image_seq_len"):
        if getattr(meta, name) != getattr(sizes, name):
            raise InputError(f"{store.path}: found {name}={getattr(meta, name)}, expected {getattr(sizes, name)}")
    if meta.num_classes > num_classes:
        raise InputError(f"{store.path}: found {meta.num_classes} classes, expected at most {num_classes}")
    return store


def export_jsonl(store: TokenStore, jsonl: Path, processes: int) -> None:
    """Write the samples as jsonl; a store beside it notes that it is the conversion of that file."""
    store_to_jsonl(store.codes, store.class_ids, store.fingerprint, jsonl, processes)
    if jsonl.with_suffix(".tokens") == store.path:
        store.meta.source = describe_source(jsonl)
        write_meta(store.path, store.meta)


def is_conversion(store_path: Path, jsonl: Path, sizes: Sizes, max_bad_fraction: float) -> bool:
    """Whether a store is there that was made from this jsonl as it is now, under the same rules."""
    if not store_path.is_dir():
        return False
    meta = TokenStore(store_path).meta
    if meta.sha256 is None or meta.num_skipped > max_bad_fraction * (meta.num_samples + meta.num_skipped):
        return False
    return (meta.source, meta.codebook_size) == (describe_source(jsonl), sizes.codebook_size)


def _open_converted(jsonl: Path, sizes: Sizes, max_bad_fraction: float) -> TokenStore:
    store_path = jsonl.with_suffix(".tokens")
    if not jsonl.is_file():
        hint = f"; there is {store_path}" if store_path.is_dir() else ""
        raise InputError(f"dataset.params.pretokenization={jsonl}: no such file{hint}")
    if not is_conversion(store_path, jsonl, sizes, max_bad_fraction):
        bad_lines = jsonl_to_store(jsonl, store_path, sizes, num_cpus(), max_bad_fraction)
        if bad_lines.count:
            reasons = "; ".join(bad_lines.reasons)
            warnings.warn(f"{jsonl}: left out {bad_lines.count} bad lines: {reasons}", stacklevel=4)
    return TokenStore(store_path)
