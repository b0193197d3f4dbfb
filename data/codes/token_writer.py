"""Writing a token store, atomically: as `<name>.tokens.tmp/`, which is renamed when it is complete."""

import hashlib
import io
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from data.codes.store_files import CLASS_IDS_FILE, TOKENS_FILE, StoreMeta, check_codebook_size, write_meta
from utils.errors import InputError
from utils.files.atomic import atomic_folder
from utils.token_ids import token_dtype


@contextmanager
def new_token_store(path: Path, meta: StoreMeta) -> Iterator["TokenStoreWriter"]:
    """A writer to append samples to. At the end the store replaces an older one, which is kept after an exception."""
    check_codebook_size(path, meta.codebook_size)
    with atomic_folder(path, replace=True) as partial:
        with closing(TokenStoreWriter(partial, meta)) as writer:
            yield writer
        if writer.num_samples == 0:
            raise InputError(f"{path}: found no sample to store, expected at least one")
        write_meta(partial, writer.finished_meta())


class TokenStoreWriter:
    """Writes the files of a store; see `new_token_store`."""

    def __init__(self, folder: Path, meta: StoreMeta) -> None:
        self.meta = meta
        self._tokens = _NpyWriter(folder / TOKENS_FILE, token_dtype(meta.codebook_size), (meta.image_seq_len,))
        self._class_ids = _NpyWriter(folder / CLASS_IDS_FILE, np.dtype(np.int32), ())
        self._largest_class_id = -1

    @property
    def num_samples(self) -> int:
        return self._tokens.rows

    def append(self, codes: np.ndarray, class_ids: np.ndarray) -> None:
        """Add B samples: integers (B, N) in [0, V) and (B,)."""
        assert len(codes) == len(class_ids)
        if len(codes) == 0:
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
        """Meta with the numbers of samples and classes, and the hashes."""
        return replace(
            self.meta,
            sha256={TOKENS_FILE: self._tokens.digest.hexdigest(), CLASS_IDS_FILE: self._class_ids.digest.hexdigest()},
            num_samples=self.num_samples,
            num_classes=len(self.meta.class_names or []) or self._largest_class_id + 1,
        )


class _NpyWriter:
    """Writes an .npy file row by row; the header is rewritten at the end, when the number of rows is known."""

    def __init__(self, path: Path, dtype: np.dtype, row_shape: tuple[int, ...]) -> None:
        self.dtype = dtype
        self.row_shape = row_shape
        self.rows = 0
        self.digest = hashlib.sha256()
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
        file = io.BytesIO()
        shape = (self.rows, *self.row_shape)
        header = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(file, header)
        return file.getvalue()
