"""Images and more in an npz file larger than memory: written and read a few rows at a time.

The layout is that of guided-diffusion (https://github.com/openai/guided-diffusion/tree/main/evaluations): `arr_0` holds
images, and other arrays may lie beside it. Our own, for numpy reads and writes whole arrays of an npz only.
"""

import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import DTypeLike
from tqdm import tqdm

from utils.errors import InputError
from utils.files.atomic import atomic_file
from utils.files.hashing import CHUNK_BYTES, file_sha256

LOCAL_HEADER_BYTES = 30  # of a zip entry, before its name; the lengths of name and extra field are the last four
NpzEntry = tuple[tuple[int, ...], DTypeLike, Iterable[np.ndarray]]  # shape, dtype, chunks along the first axis

# A constant time stamp (the earliest that zip knows): equal arrays give equal files.
ZIP_DATE = (1980, 1, 1, 0, 0, 0)


def write_npz(path: Path, entries: Mapping[str, NpzEntry]) -> None:
    """Write arrays one after another, chunk by chunk, uncompressed; `np.load` reads the result.

    The file appears under its name only when it is complete; until then it is `<path>.tmp`, which an error removes.

    Args:
        entries: by name: the array's shape and dtype, and its rows in chunks (rows, *shape[1:]), each read once.

    Raises:
        ValueError: chunks that differ from the announced dtype or shape.
    """
    with atomic_file(Path(path)) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for name, (shape, dtype, chunks) in entries.items():
            info = zipfile.ZipInfo(f"{name}.npy", ZIP_DATE)
            with archive.open(info, "w", force_zip64=True) as member:
                _write_array(member, name, shape, np.dtype(dtype), chunks)


def _write_array(
    member: IO[bytes], name: str, shape: tuple[int, ...], dtype: np.dtype, chunks: Iterable[np.ndarray]
) -> None:
    header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(shape)}
    npy.write_array_header_1_0(member, header)
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


@dataclass(frozen=True)
class StoredImages:
    """`arr_0` of an npz, uint8 (N, H, W, 3). Rows are read when asked for: mapped pages would count as memory."""

    path: Path
    offset: int  # byte of the file at which the first image starts
    shape: tuple[int, int, int, int]

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images `start` to `stop`, uint8 (stop - start, H, W, 3)."""
        image_bytes = int(np.prod(self.shape[1:]))
        first = self.offset + start * image_bytes
        rows = np.fromfile(self.path, np.uint8, (stop - start) * image_bytes, offset=first)
        return rows.reshape(stop - start, *self.shape[1:])


@dataclass(frozen=True)
class Npz:
    images: StoredImages
    statistics: dict[str, np.ndarray] | None  # float64; None: the file has none
    sha256: str | None  # of the file; None where it was opened without verifying


def open_npz(path: Path, verify: bool, statistics: dict[str, tuple[int, ...]], min_images: int) -> Npz:
    """Check an npz and open it.

    Args:
        verify: also read every byte once: checksums of the zip, and the sha256 of the file.
        statistics: names and shapes of arrays of floats of which the file holds all or none.
        min_images: fewer are refused.

    Raises:
        InputError: no such file, damaged, `arr_0` missing, of the wrong dtype or shape, compressed or too short,
            or statistics that are incomplete, of the wrong shape or not finite.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            if verify:
                _check_crc(archive, path)
            images = _locate_images(archive, path, min_images)
            found = _read_statistics(archive, path, statistics)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise InputError(f"{path}: damaged or not an npz file ({error})") from error
    return Npz(images, found, file_sha256(path, progress=True) if verify else None)


def _check_crc(archive: zipfile.ZipFile, path: Path) -> None:
    """Read all entries, a chunk at a time.

    Raises:
        zipfile.BadZipFile: an entry differs from its checksum.
    """
    total = sum(info.file_size for info in archive.infolist())
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"check {path.name}", delay=1) as bar:
        for info in archive.infolist():
            with archive.open(info) as entry:
                while chunk := entry.read(CHUNK_BYTES):
                    bar.update(len(chunk))


def _locate_images(archive: zipfile.ZipFile, path: Path, min_images: int) -> StoredImages:
    """Find the bytes of `arr_0`; raises InputError (see `open_npz`)."""
    if "arr_0.npy" not in archive.namelist():
        found = ", ".join(name.removesuffix(".npy") for name in archive.namelist())
        raise InputError(f"{path}: arr_0 is missing, found {found or 'no array'}")
    info = archive.getinfo("arr_0.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        raise InputError(f"{path}: arr_0 is compressed, expected an npz of numpy.savez (not savez_compressed)")
    with path.open("rb") as file:
        file.seek(info.header_offset)
        name_bytes, extra_bytes = struct.unpack("<26xHH", file.read(LOCAL_HEADER_BYTES))
        start = info.header_offset + LOCAL_HEADER_BYTES + name_bytes + extra_bytes
        file.seek(start)
        try:
            read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
            shape, fortran_order, dtype = read_header[npy.read_magic(file)](file)
        except (ValueError, KeyError) as error:
            raise InputError(f"{path}: arr_0 has no readable npy header ({error})") from error
        offset = file.tell()
    if dtype != np.uint8:
        raise InputError(f"{path}: arr_0 has dtype {dtype}, expected uint8")
    if len(shape) != 4 or shape[3] != 3 or 0 in shape[1:] or fortran_order:
        order = " in Fortran order" if fortran_order else ""
        raise InputError(f"{path}: arr_0 has shape {shape}{order}, expected (images, height, width, 3 channels)")
    if shape[0] < min_images:
        raise InputError(f"{path}: arr_0 holds {shape[0]} images, expected at least {min_images}")
    found, expected = start + info.file_size - offset, int(np.prod(shape))
    if found != expected:
        raise InputError(f"{path}: arr_0 has {found} bytes, expected {expected} for shape {shape}")
    return StoredImages(path, offset, shape)


def _read_statistics(
    archive: zipfile.ZipFile, path: Path, shapes: dict[str, tuple[int, ...]]
) -> dict[str, np.ndarray] | None:
    """The arrays of these names and shapes as float64; raises InputError (see `open_npz`)."""
    missing = [key for key in shapes if f"{key}.npy" not in archive.namelist()]
    if len(missing) == len(shapes):
        return None
    if missing:
        raise InputError(f"{path}: {missing[0]} is missing, expected all of {', '.join(shapes)} or none")
    statistics = {}
    for key, shape in shapes.items():
        with archive.open(f"{key}.npy") as entry:
            try:
                array = npy.read_array(entry, allow_pickle=False)
            except ValueError as error:
                raise InputError(f"{path}: {key} is not readable ({error})") from error
        if array.shape != shape or array.dtype.kind != "f":
            raise InputError(f"{path}: {key} is {array.dtype} of shape {array.shape}, expected floats of shape {shape}")
        if not np.isfinite(array).all():
            raise InputError(f"{path}: {key} has values that are not finite, expected finite floats")
        statistics[key] = array.astype(np.float64)
    return statistics
