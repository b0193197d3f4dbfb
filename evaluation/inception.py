"""The Inception network of 2015-12-05, behind all published FID numbers.

torch-fidelity (https://github.com/toshas/torch-fidelity) has the network with TensorFlow's peculiarities: resize to 299
pixels without half-pixel centres, average pools that ignore the padding, a max pool in Mixed_7c. Added here: the
spatial features of sFID (https://arxiv.org/abs/2103.03841) and logits without bias in float64.
"""

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evaluation.features import Features
from evaluation.inputs import POOL_DIM, SPATIAL_DIM
from utils.errors import InputError
from utils.files.hashing import file_sha256
from utils.files.weights import check_fits, load_state_dict

PUBLISHED_SHA256 = "6726825d"  # how the hash of the published weights starts
CACHED_NAMES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
SPATIAL_CHANNELS = 7  # the first of the 1x1 branch of Mixed_6d


class Inception:
    """Features for inception_score, fid, sfid, precision and recall."""

    pool_dim: int = POOL_DIM
    spatial_dim: int | None = SPATIAL_DIM
    n_classes: int | None = 1008
    packages: tuple[str, ...] = ("torch-fidelity",)

    def __init__(self, device: torch.device, path: Path | None = None) -> None:
        """Weights from `path` or torch hub's cache; nothing is downloaded. Raises InputError if missing or wrong."""
        path = path or find_cached_weights()
        state = load_state_dict(path)
        self.weights_name, self.weights_sha256 = path.name, file_sha256(path, progress=True)
        self.network = build_network(state, path).to(device)
        self.classifier = self.network.fc.weight.double().T  # (2048, 1008); the score uses no bias
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)
        self._spatial: Tensor | None = None

    def _keep_spatial(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (B, 7, 17, 17) -> (B, 2023)

    def __call__(self, images: Tensor) -> Features:
        """(B, H, W, 3) uint8 -> pool (B, 2048), spatial (B, 2023), log_probs (B, 1008)."""
        (pool,) = self.network(images.permute(0, 3, 1, 2))  # (B, 2048)
        return Features(pool, self._spatial, (pool.double() @ self.classifier).log_softmax(1))

    @property
    def caveat(self) -> str | None:
        published = self.weights_sha256.startswith(PUBLISHED_SHA256)
        return None if published else "not the published Inception weights; the numbers are not comparable with others"


def find_cached_weights() -> Path:
    """The weights in torch hub's cache, where torch-fidelity and pytorch-fid put them; raises InputError without."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for name in CACHED_NAMES:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"--inception: missing, and {folder} holds neither {' nor '.join(CACHED_NAMES)}")


def build_network(state: dict[str, Tensor], path: Path) -> Any:
    """torch-fidelity's network with these weights; raises InputError if they are of a different network."""
    from torch_fidelity import FeatureExtractorInceptionV3

    # The constructor unpickles its file without restrictions, so it gets the checked tensors instead.
    checked = io.BytesIO()
    torch.save(state, checked)
    checked.seek(0)
    try:
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=checked)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: not the weights of Inception 2015-12-05 ({reason} ...)") from error
    check_fits(network, network.state_dict() | state, path)  # the file lacks the batch norms' counters
    return network
