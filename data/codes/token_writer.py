"""Writing a token store. The folder is written as `<name>.tokens.tmp/` and renamed when it is complete."""

import hashlib
import io
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from data.codes.store_files import CLASS_IDS_FILE, TOKENS_FILE, StoreMeta, check_codebook_size, write_meta
from utils.errors import InputError
from utils.files.atomic import atomic_folder


@contextmanager
def new_token_store(path: Path, meta: StoreMeta) -> Iterator["TokenStoreWriter"]:
    """Give a writer to append to; the store takes the place of an older one at the end, and not after an exception.

    Raises:
        InputError: more codes than uint16 holds, or no samples.
    """
    check_codebook_size(path, meta.codebook_size)
    with atomic_folder(path) as partial:
        with closing(TokenStoreWriter(partial, meta)) as writer:
            yield writer
        if writer.num_samples == 0:
            raise InputError(f"{path}: found no sample to store, expected at least one")
        write_meta(partial, writer.finished_meta())
        if path.exists():
            shutil.rmtree(path)


class TokenStoreWriter:
    """The files of a store in the making: see `new_token_store`."""

    def __init__(self, folder: Path, meta: StoreMeta) -> None:
        self.meta = meta
        self._tokens = _NpyWriter(folder / TOKENS_FILE, np.dtype(np.uint16), (meta.image_seq_len,))
        self._class_ids = _NpyWriter(folder / CLASS_IDS_FILE, np.dtype(np.int32), ())
        self._largest_class_id = -1

    @property
    def num_samples(self) -> int:
        return self._tokens.rows

    def append(self, codes: np.ndarray, class_ids: np.ndarray) -> None:
        """Add B samples: integers (B, N) in [0, V) and (B,)."""
        assert len(codes) == len(class_ids)
        if not len(codes):
            return
        assert codes.min() >= 0
        assert codes.max() < self.meta.codebook_size
        assert class_ids.min() >= 0
        self._tokens.append(codes)
        self._class_ids.append(class_ids)
        self._largest_class_id = max(self._largest_class_id, int(class_ids.max()))

    def close(self) -> None:
        self._tokens.close()
        self._class_ids.close()

    def finished_meta(self) -> StoreMeta:
        """With what is known now: numbers of samples and classes, and the hashes."""
        return replace(
            self.meta,
            sha256={TOKENS_FILE: self._tokens.digest.hexdigest(), CLASS_IDS_FILE: self._class_ids.digest.hexdigest()},
            num_samples=self.num_samples,
            num_classes=len(self.meta.class_names or []) or self._largest_class_id + 1,
        )


class _NpyWriter:
    """An .npy file of a number of rows that is known only at the end, when the header is written again."""

    def __init__(self, path: Path, dtype: np.dtype, row_shape: tuple[int, ...]) -> None:
        self.dtype, self.row_shape, self.rows, self.digest = dtype, row_shape, 0, hashlib.sha256()
        self._file = path.open("wb")
        self._data_start = self._file.write(self._header())

    def append(self, rows: np.ndarray) -> None:
        assert rows.shape[1:] == self.row_shape
        content = np.ascontiguousarray(rows, dtype=self.dtype).tobytes()
        self.digest.update(content)
        self._file.write(content)
        self.rows += len(rows)

    def close(self) -> None:
        header = self._header()
        assert len(header) == self._data_start  # numpy pads headers for a growing first dimension
        self._file.seek(0)
        self._file.write(header)
        self._file.close()

    def _header(self) -> bytes:
        header = io.BytesIO()
        shape, descr = (self.rows, *self.row_shape), np.lib.format.dtype_to_descr(self.dtype)
        np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
        return header.getvalue()
