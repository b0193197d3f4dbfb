"""Images and statistics in an npz file: checked once, then read a few rows at a time.

The layout is that of guided-diffusion (https://github.com/openai/guided-diffusion/tree/main/evaluations): `arr_0` holds
images, and a reference may also hold the Inception statistics `mu`, `sigma`, `mu_s`, `sigma_s`.
"""

import hashlib
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from tqdm import tqdm

from utils.errors import InputError

POOL_DIM, SPATIAL_DIM = 2048, 2023  # Inception pool_3, and 17 x 17 positions x 7 channels
STATISTICS = {
    "mu": (POOL_DIM,),
    "sigma": (POOL_DIM, POOL_DIM),
    "mu_s": (SPATIAL_DIM,),
    "sigma_s": (SPATIAL_DIM, SPATIAL_DIM),
}
MIN_IMAGES = 4  # a radius of precision and recall is the distance to the third neighbour
CHUNK_BYTES = 1 << 20
LOCAL_HEADER_BYTES = 30  # of a zip entry, before its name; the lengths of name and extra field are the last four


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
class NpzInput:
    """One argument of the evaluator."""

    images: StoredImages
    statistics: dict[str, np.ndarray] | None  # float64, keys and shapes as in STATISTICS
    sha256: str | None  # of the file; None where it was opened without verifying


def open_npz(path: Path, verify: bool) -> NpzInput:
    """Check an npz and open it. `verify` also reads every byte once: checksums of the zip, and the sha256 of the file.

    Raises:
        InputError: no such file, damaged, `arr_0` missing, of the wrong dtype or shape, compressed or too short,
            or statistics that are incomplete, of the wrong shape or not finite.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            if verify:
                check_crc(archive, path)
            images = locate_images(archive, path)
            statistics = read_statistics(archive, path)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise InputError(f"{path}: damaged or not an npz file ({error})") from error
    return NpzInput(images, statistics, file_sha256(path) if verify else None)


def check_crc(archive: zipfile.ZipFile, path: Path) -> None:
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


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    total = path.stat().st_size
    with path.open("rb") as file, tqdm(total=total, unit="B", unit_scale=True, desc="sha256", delay=1) as bar:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def locate_images(archive: zipfile.ZipFile, path: Path) -> StoredImages:
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
    if shape[0] < MIN_IMAGES:
        raise InputError(f"{path}: arr_0 holds {shape[0]} images, expected at least {MIN_IMAGES}")
    found, expected = start + info.file_size - offset, int(np.prod(shape))
    if found != expected:
        raise InputError(f"{path}: arr_0 has {found} bytes, expected {expected} for shape {shape}")
    return StoredImages(path, offset, shape)


def read_statistics(archive: zipfile.ZipFile, path: Path) -> dict[str, np.ndarray] | None:
    """The stored Inception statistics, float64, or None if the file has none; raises InputError (see `open_npz`)."""
    missing = [key for key in STATISTICS if f"{key}.npy" not in archive.namelist()]
    if len(missing) == len(STATISTICS):
        return None
    if missing:
        raise InputError(f"{path}: {missing[0]} is missing, expected all of {', '.join(STATISTICS)} or none")
    statistics = {}
    for key, shape in STATISTICS.items():
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
