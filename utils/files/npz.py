"""npz files of images larger than memory, written and read a few rows at a time; numpy reads and writes whole arrays.

`arr_0` holds the images, as in guided-diffusion (https://github.com/openai/guided-diffusion/tree/main/evaluations).
"""

import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from numpy.typing import DTypeLike

from utils.errors import InputError
from utils.files.atomic import atomic_file
from utils.files.hashing import file_sha256

ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # constant, so that equal arrays give equal files
NpzEntry = tuple[tuple[int, ...], DTypeLike, Iterable[np.ndarray]]  # shape, dtype, chunks along the first axis


def write_npz(path: Path, entries: Mapping[str, NpzEntry]) -> None:
    """Write arrays chunk by chunk, uncompressed and atomically.

    Args:
        entries: by name: shape, dtype, and the rows in chunks (rows, *shape[1:]), each read once.

    Raises:
        ValueError: chunks of another dtype or shape.
    """
    with atomic_file(Path(path)) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for name, (shape, dtype, chunks) in entries.items():
            rows = 0
            with archive.open(zipfile.ZipInfo(f"{name}.npy", ZIP_DATE), "w", force_zip64=True) as member:
                descr = npy.dtype_to_descr(np.dtype(dtype))
                npy.write_array_header_1_0(member, {"descr": descr, "fortran_order": False, "shape": tuple(shape)})
                for chunk in chunks:
                    if chunk.dtype != dtype or chunk.shape[1:] != tuple(shape[1:]):
                        expected = f"{np.dtype(dtype)} (rows, *{tuple(shape[1:])})"
                        raise ValueError(f"{name}: found a chunk of {chunk.dtype} {chunk.shape}, expected {expected}")
                    member.write(np.ascontiguousarray(chunk).data)
                    rows += len(chunk)
            if rows != shape[0]:
                raise ValueError(f"{name}: found {rows} rows, expected {shape[0]}")


@dataclass(frozen=True)
class StoredImages:
    """`arr_0` of an npz, uint8 (N, H, W, 3), read in slices. A memory map would count as memory of the process."""

    path: Path
    offset: int  # of the first image in the file, in bytes
    shape: tuple[int, int, int, int]

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images `start` to `stop`, uint8 (stop - start, H, W, 3)."""
        image_bytes = int(np.prod(self.shape[1:]))
        offset = self.offset + start * image_bytes
        rows = np.fromfile(self.path, dtype=np.uint8, count=(stop - start) * image_bytes, offset=offset)
        return rows.reshape(stop - start, *self.shape[1:])


@dataclass(frozen=True)
class Npz:
    images: StoredImages
    statistics: dict[str, np.ndarray] | None  # float64; None if the file has none
    sha256: str | None  # of the file; None if it was opened without `verify`


def open_npz(path: Path, verify: bool, statistics: dict[str, tuple[int, ...]], min_images: int) -> Npz:
    """Check an npz and open it.

    Args:
        verify: also compare all bytes with the checksums in the file, and hash the file.
        statistics: names and shapes of arrays of floats; the file holds all of them or none.
        min_images: fewer are an error.

    Raises:
        InputError: no such file, damaged, `arr_0` missing, compressed, too short, or of another dtype or shape,
            statistics that are incomplete, of another shape or not finite.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() if verify else None
            if damaged is not None:
                raise zipfile.BadZipFile(f"{damaged} differs from its CRC")
            images = _locate_images(archive, path, min_images)
        found = _read_statistics(path, statistics)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise InputError(f"{path}: damaged or not an npz file ({error})") from error
    return Npz(images=images, statistics=found, sha256=file_sha256(path, progress=True) if verify else None)


def _locate_images(archive: zipfile.ZipFile, path: Path, min_images: int) -> StoredImages:
    names = [name.removesuffix(".npy") for name in archive.namelist()]
    if "arr_0" not in names:
        raise InputError(f"{path}: arr_0 is missing, found {', '.join(names) or 'no array'}")
    info = archive.getinfo("arr_0.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        raise InputError(f"{path}: arr_0 is compressed, expected an npz of numpy.savez (not savez_compressed)")
    with path.open("rb") as file:
        file.seek(info.header_offset)
        name_bytes, extra_bytes = struct.unpack("<26xHH", file.read(30))  # the local header of the entry
        start = file.seek(name_bytes + extra_bytes, 1)
        try:
            version = npy.read_magic(file)
            read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, fortran_order, dtype = read_header(file)
        except ValueError as error:
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


def _read_statistics(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray] | None:
    statistics = {}
    with np.load(path) as arrays:
        missing = [key for key in shapes if key not in arrays]
        if len(missing) == len(shapes):
            return None
        if missing:
            raise InputError(f"{path}: {missing[0]} is missing, expected all of {', '.join(shapes)} or none")
        for key, shape in shapes.items():
            try:
                array = arrays[key]
            except ValueError as error:
                raise InputError(f"{path}: {key} is not readable ({error})") from error
            if array.shape != shape or array.dtype.kind != "f" or not np.isfinite(array).all():
                raise InputError(
                    f"{path}: {key} is {array.dtype} of shape {array.shape}, expected finite floats of shape {shape}"
                )
            statistics[key] = array.astype(np.float64)
    return statistics
