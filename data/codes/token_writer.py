"""Writing a token store. The folder is written as `<name>.tokens.tmp/` and renamed when it is complete."""

import hashlib
import io
import os
import shutil
from dataclasses import replace
from math import isqrt
from pathlib import Path
from types import TracebackType

import numpy as np

from data.codes.store_files import CLASS_IDS_FILE, TOKENS_FILE, StoreMeta, check_codebook_size, write_meta
from utils.errors import InputError


class TokenStoreWriter:
    """Append batches inside `with`; the store appears at the end of the block, and not at all after an exception.

    Raises:
        InputError: more codes than uint16 holds, or no samples.
    """

    def __init__(self, path: Path, meta: StoreMeta) -> None:
        check_codebook_size(path, meta.codebook_size)
        self.path, self.meta = path, meta
        self.partial = path.with_name(path.name + ".tmp")
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        self._tokens = _NpyWriter(self.partial / TOKENS_FILE, np.dtype(np.uint16), (meta.image_seq_len,))
        self._class_ids = _NpyWriter(self.partial / CLASS_IDS_FILE, np.dtype(np.int32), ())
        self._largest_class_id = -1

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

    def __enter__(self) -> "TokenStoreWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._tokens.close()
            self._class_ids.close()
            if kind is None:
                self._publish()
        finally:
            shutil.rmtree(self.partial, ignore_errors=True)

    def _publish(self) -> None:
        if self._tokens.rows == 0:
            raise InputError(f"{self.path}: found no sample to store, expected at least one")
        num_classes = len(self.meta.class_names or []) or self._largest_class_id + 1
        hashes = {TOKENS_FILE: self._tokens.digest.hexdigest(), CLASS_IDS_FILE: self._class_ids.digest.hexdigest()}
        grid_size = isqrt(self.meta.image_seq_len)
        sizes = {"num_samples": self._tokens.rows, "num_classes": num_classes}
        sizes["grid_size"] = grid_size if grid_size**2 == self.meta.image_seq_len else None
        write_meta(self.partial, replace(self.meta, sha256=hashes, **sizes))
        if self.path.exists():
            shutil.rmtree(self.path)
        self.partial.rename(self.path)


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
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _header(self) -> bytes:
        header = io.BytesIO()
        shape, descr = (self.rows, *self.row_shape), np.lib.format.dtype_to_descr(self.dtype)
        np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
        return header.getvalue()
