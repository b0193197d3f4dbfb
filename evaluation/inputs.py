"""Input files of the evaluator: npz files of images, with Inception statistics in a reference."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.errors import InputError, errors_name
from utils.files.hashing import file_sha256
from utils.files.json_file import read_json
from utils.files.npz import StoredImages, locate_images
from utils.files.provenance import provenance_in

POOL_DIM, SPATIAL_DIM = 2048, 2023  # Inception pool_3, and 17 x 17 positions x 7 channels
STATISTICS = {
    "mu": (POOL_DIM,),
    "sigma": (POOL_DIM, POOL_DIM),
    "mu_s": (SPATIAL_DIM,),
    "sigma_s": (SPATIAL_DIM, SPATIAL_DIM),
}
WEIGHTS = "sha256 of the Inception weights"  # in the record next to a reference of make_reference.py
MIN_IMAGES = 4  # precision and recall need three neighbours of each image


@dataclass(frozen=True)
class Npz:
    images: StoredImages
    statistics: dict[str, np.ndarray] | None  # float64, by the keys of STATISTICS; None if the file has none
    sha256: str | None  # of the file; None if it was opened without `verify`
    labels: np.ndarray | None = None  # (N,), arr_1; None if the file has none


def open_input(path: Path, verify: bool) -> Npz:
    """Check an npz and open it; raises InputError, one line, for anything wrong.

    Args:
        verify: also compare all bytes with the checksums in the file, and hash the file.
    """
    if path.suffix == ".tokens":  # written by the sampler for a tokenizer without images
        raise InputError(f"{path}: found codes, expected an npz of images; decode them with their tokenizer")
    if path.is_dir():
        pack = 'numpy.savez("samples.npz", arr_0=images), with images uint8 (N, H, W, 3)'
        raise InputError(f"{path}: found a folder, expected an npz of images; pack the images with {pack}")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with errors_name(path), zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() if verify else None
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} differs from its CRC")
        images = locate_images(path)
        statistics = _read_statistics(path)
        labels = _read_labels(path, len(images))
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise InputError(f"{path}: damaged or not an npz file ({error})") from error
    if len(images) < MIN_IMAGES:
        raise InputError(f"{path}: arr_0 holds {len(images)} images, expected at least {MIN_IMAGES}")
    sha256 = file_sha256(path, progress=True) if verify else None
    return Npz(images=images, statistics=statistics, sha256=sha256, labels=labels)


def _read_labels(path: Path, num_images: int) -> np.ndarray | None:
    with np.load(path) as arrays:
        try:
            labels = arrays["arr_1"]
        except (KeyError, ValueError):  # none, or Python objects
            return None
    return labels if labels.shape == (num_images,) else None


def _read_statistics(path: Path) -> dict[str, np.ndarray] | None:
    statistics = {}
    with errors_name(path), np.load(path) as arrays:
        missing = [key for key in STATISTICS if key not in arrays]
        if len(missing) == len(STATISTICS):
            return None
        if missing:
            raise InputError(f"{path}: {missing[0]} is missing, expected all of {', '.join(STATISTICS)} or none")
        for key, shape in STATISTICS.items():
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


def check_statistics(npz: Npz, weights_sha256: str) -> None:
    """Raise InputError if the stored statistics are from other Inception weights."""
    path = npz.images.path.with_suffix(".json")
    if npz.statistics is None or not path.is_file():
        return
    found = (provenance_in(read_json(path)) or {}).get(WEIGHTS)
    if found not in (None, weights_sha256):
        raise InputError(
            f"{npz.images.path}: found statistics of Inception weights with sha256 {found[:12]}..., expected "
            f"{weights_sha256[:12]}..., the weights of this evaluation"
        )
