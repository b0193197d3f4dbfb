"""Features of a frozen image encoder as targets."""

from collections.abc import Mapping

from torch import Tensor

from modeling.encoders.registry import open_encoder
from modeling.targets.target import Target, key_of
from modeling.tokenizers.tokenizer import Tokenizer
from utils.keys import ConfigError
from utils.schema import Config, TapConfig


class EncoderFeatures(Target):
    """Patch features of a frozen image encoder, `source`, on the grid of the codes: REPA
    (https://arxiv.org/abs/2410.06940)."""

    needs_images = True

    def __init__(self, tap: TapConfig, config: Config, tokenizer: Tokenizer, num_samples: int | None) -> None:
        if tap.source is None:
            raise ConfigError(f"{key_of(tap)}: found no source, expected efficientnet_lite0 or timm:NAME[:FILE]")
        grid = tokenizer.code_shape
        if len(grid) != 2 or grid[0] != grid[1]:
            raise ConfigError(
                f"{key_of(tap)}: found codes of shape {grid} (model.vq_model.model_type={tokenizer.model_type}), "
                "expected a square grid, so that each code has a patch"
            )
        self.encoder = open_encoder(tap.source, grid_size=grid[0]).to(next(tokenizer.parameters()).device)
        self.z_dim = self.encoder.patch_dim
        self.description = f"features of {self.encoder}"

    def vectors(self, codes: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return self.encoder.patch_features(batch["image"])
