"""Input files of the evaluator: npz files of images, with Inception statistics in a reference."""

from pathlib import Path

from utils.errors import InputError
from utils.files.json_file import read_json
from utils.files.npz import Npz, open_npz
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


def open_input(path: Path, verify: bool) -> Npz:
    """Check an npz and open it; see `open_npz`.

    Raises:
        InputError: as there, or a store of codes, which the sampler writes for a tokenizer without images.
    """
    if path.suffix == ".tokens":
        raise InputError(f"{path}: found codes, expected an npz of images; decode them with their tokenizer")
    return open_npz(path, verify, STATISTICS, MIN_IMAGES)


def check_statistics(npz: Npz, weights_sha256: str) -> None:
    """
    Raises:
        InputError: the stored statistics are from other Inception weights.
    """
    record = npz.images.path.with_suffix(".json")
    if npz.statistics is None or not record.is_file():
        return
    found = (provenance_in(read_json(record)) or {}).get(WEIGHTS)
    if found not in (None, weights_sha256):
        raise InputError(
            f"{npz.images.path}: found statistics of Inception weights with sha256 {found[:12]}..., expected "
            f"{weights_sha256[:12]}..., the weights of this evaluation"
        )
