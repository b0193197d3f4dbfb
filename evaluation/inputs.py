"""What the evaluator takes: npz files of images, and of a reference the Inception statistics that it may hold."""

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
WEIGHTS = "sha256 of the Inception weights"  # in the record beside a reference of our own
MIN_IMAGES = 4  # a radius of precision and recall is the distance to the third neighbour


def open_input(path: Path, verify: bool) -> Npz:
    """Check an npz and open it; see `open_npz`, also for the errors.

    Raises:
        InputError: a store of codes, as the sampler writes for a tokenizer without images.
    """
    if path.suffix == ".tokens":
        raise InputError(f"{path}: codes, expected an npz of images; decode them with the tokenizer that they are from")
    return open_npz(path, verify, STATISTICS, MIN_IMAGES)


def check_statistics(npz: Npz, weights_sha256: str) -> None:
    """
    Raises:
        InputError: the statistics that the file holds are known to come from other Inception weights.
    """
    record = npz.images.path.with_suffix(".json")
    if npz.statistics is None or not record.is_file():
        return
    found = (provenance_in(read_json(record)) or {}).get(WEIGHTS)
    if found not in (None, weights_sha256):
        raise InputError(
            f"{npz.images.path}: holds statistics by Inception weights of sha256 {found[:12]}..., expected those of "
            f"this evaluation, {weights_sha256[:12]}..."
        )
