"""An adversarial loss on frozen features, as in Projected GAN (https://arxiv.org/abs/2111.01007): small heads tell the
feature maps of reconstructions from those of images. The features are those of the perceptual distance, so that the
loss costs little beside it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

HEAD_WIDTH = 64


class FeatureDiscriminator(nn.Module):
    """One head per feature map; its output judges each position of the map."""

    def __init__(self, feature_channels: list[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                spectral_norm(nn.Conv2d(channels, HEAD_WIDTH, kernel_size=1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(HEAD_WIDTH, HEAD_WIDTH, kernel_size=3, padding=1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(HEAD_WIDTH, 1, kernel_size=1)),
            )
            for channels in feature_channels
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Judgements (B, 1, h, w) of maps (B, C, h, w) of unit length along C; positive means an image."""
        # sqrt(C): entries of size one, whatever the number of channels.
        return [head(x * x.shape[1] ** 0.5) for head, x in zip(self.heads, maps, strict=True)]


def generator_loss(judgements: list[Tensor]) -> Tensor:
    """A scalar that falls as the reconstructions are taken for images."""
    return -torch.stack([x.mean() for x in judgements]).mean()


def discriminator_loss(image_judgements: list[Tensor], reconstruction_judgements: list[Tensor]) -> Tensor:
    """The hinge loss, a scalar; 1 while the two are judged alike near 0, 0 when they are told apart by a margin."""
    pairs = zip(image_judgements, reconstruction_judgements, strict=True)
    return 0.5 * torch.stack([F.relu(1 - x).mean() + F.relu(1 + y).mean() for x, y in pairs]).mean()
