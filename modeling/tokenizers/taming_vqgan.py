"""The VQGAN of taming-transformers (https://arxiv.org/abs/2012.09841), f16 with 1,024 or 16,384 codes of width 256.

Attention is where the published models have it, at 16 x 16 of 256 x 256 pixels: in the last level.
"""

from torch import Tensor

from modeling.tokenizers.vqgan import VQGAN, Names


class TamingVQGAN(VQGAN):
    """VQGAN under its first names."""

    name = "taming VQGAN"
    names = Names("down", "up", True, "block", ("block_1", "attn_1", "block_2"))
    level_key = "encoder.down.{}.block.{}.conv2.weight"
    mid_key = "encoder.mid.block_1.norm1.weight"

    @classmethod
    def weights_of(cls, state: dict[str, Tensor], source: object) -> dict[str, Tensor]:
        # Networks of its training, perceptual and discriminator, are in the file too.
        return {key: value for key, value in state.items() if not key.startswith("loss.")}
