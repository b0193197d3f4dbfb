"""What the evaluator takes: npz files of images, and of a reference the Inception statistics that it may hold."""

from pathlib import Path

from utils.files.npz import Npz, open_npz

POOL_DIM, SPATIAL_DIM = 2048, 2023  # Inception pool_3, and 17 x 17 positions x 7 channels
STATISTICS = {
    "mu": (POOL_DIM,),
    "sigma": (POOL_DIM, POOL_DIM),
    "mu_s": (SPATIAL_DIM,),
    "sigma_s": (SPATIAL_DIM, SPATIAL_DIM),
}
MIN_IMAGES = 4  # a radius of precision and recall is the distance to the third neighbour


def open_input(path: Path, verify: bool) -> Npz:
    """Check an npz and open it; see `open_npz`, also for the errors."""
    return open_npz(path, verify, STATISTICS, MIN_IMAGES)
