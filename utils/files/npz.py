"""npz files of images larger than memory, written and read a few rows at a time; numpy reads and writes whole arrays.

`arr_0` holds the images, as in guided-diffusion (https://github.com/openai/guided-diffusion/tree/main/evaluations).
"""

import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from numpy.typing import DTypeLike

from utils.errors import InputError, errors_name
from utils.files.atomic import atomic_file

ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # constant, so that equal arrays give equal files
NpzEntry = tuple[tuple[int, ...], DTypeLike, Iterable[np.ndarray]]  # shape, dtype, chunks along the first axis


def write_npz(path: Path, entries: Mapping[str, NpzEntry]) -> None:
    """Write arrays chunk by chunk, uncompressed and atomically.

    `entries`: shape, dtype and chunks (rows, *shape[1:]) by name, each chunk read once. Raises ValueError for chunks of
    another dtype or shape.
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
        images = np.empty((stop - start, *self.shape[1:]), dtype=np.uint8)
        with errors_name(self.path), self.path.open("rb") as file:
            file.seek(self.offset + start * int(np.prod(self.shape[1:])))
            if file.readinto(images.data) != images.nbytes:
                raise InputError(f"{self.path}: ends before image {stop - 1}; it was cut after opening")
        return images


def locate_images(path: Path) -> StoredImages:
    """Find `arr_0` in an npz; raises InputError unless it is uncompressed uint8 (N, H, W, 3)."""
    with errors_name(path), zipfile.ZipFile(path) as archive, path.open("rb") as file:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        if "arr_0" not in names:
            raise InputError(f"{path}: arr_0 is missing, found {', '.join(names) or 'no array'}")
        info = archive.getinfo("arr_0.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            raise InputError(f"{path}: arr_0 is compressed, expected an npz of numpy.savez (not savez_compressed)")
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
    found, expected = start + info.file_size - offset, int(np.prod(shape))
    if found != expected:
        raise InputError(f"{path}: arr_0 has {found} bytes, expected {expected} for shape {shape}")
    return StoredImages(path, offset, shape)
