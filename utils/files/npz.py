"""Writing npz files larger than memory."""

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import DTypeLike

from utils.files.atomic import complete_file

NpzEntry = tuple[tuple[int, ...], DTypeLike, Iterable[np.ndarray]]  # shape, dtype, chunks along the first axis

# A constant time stamp (the earliest that zip knows): equal arrays give equal files.
ZIP_DATE = (1980, 1, 1, 0, 0, 0)


def write_npz(path: Path, entries: dict[str, NpzEntry]) -> None:
    """Write arrays one after another, chunk by chunk, uncompressed; `np.load` reads the result.

    The file appears under its name only when it is complete; until then it is `<path>.tmp`, which an error removes.

    Args:
        entries: by name: the array's shape and dtype, and its rows in chunks (rows, *shape[1:]), each read once.

    Raises:
        ValueError: chunks that differ from the announced dtype or shape.
    """
    with complete_file(Path(path)) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for name, (shape, dtype, chunks) in entries.items():
            info = zipfile.ZipInfo(f"{name}.npy", ZIP_DATE)
            with archive.open(info, "w", force_zip64=True) as member:
                _write_array(member, name, shape, np.dtype(dtype), chunks)


def _write_array(
    member: IO[bytes], name: str, shape: tuple[int, ...], dtype: np.dtype, chunks: Iterable[np.ndarray]
) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(member, header)
    rows = 0
    for chunk in chunks:
        if chunk.dtype != dtype or chunk.shape[1:] != tuple(shape[1:]):
            raise ValueError(
                f"{name}: found a chunk of {chunk.dtype} {chunk.shape}, expected {dtype} (rows, *{tuple(shape[1:])})"
            )
        member.write(np.ascontiguousarray(chunk).data)
        rows += len(chunk)
    if rows != shape[0]:
        raise ValueError(f"{name}: found {rows} rows, expected {shape[0]}")
