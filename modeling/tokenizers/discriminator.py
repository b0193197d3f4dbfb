"""An adversarial loss on frozen features, as in Projected GAN (https://arxiv.org/abs/2111.01007): small heads classify
the feature maps of images and reconstructions, which the perceptual distance has computed already.
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
        """Logits (B, 1, h, w) for maps (B, C, h, w) of unit length along C; positive means an image."""
        # sqrt(C) scales the entries to about one.
        return [head(x * x.shape[1] ** 0.5) for head, x in zip(self.heads, maps, strict=True)]


def generator_loss(logits: list[Tensor]) -> Tensor:
    """A scalar; low if the reconstructions are classified as images."""
    return -torch.stack([x.mean() for x in logits]).mean()


def discriminator_loss(image_logits: list[Tensor], reconstruction_logits: list[Tensor]) -> Tensor:
    """The hinge loss, a scalar; 1 for logits of 0, 0 if all are classified with a margin."""
    pairs = zip(image_logits, reconstruction_logits, strict=True)
    return 0.5 * torch.stack([F.relu(1 - x).mean() + F.relu(1 + y).mean() for x, y in pairs]).mean()
