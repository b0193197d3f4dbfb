"""The VQGAN of taming-transformers (https://arxiv.org/abs/2012.09841), f16 with 1,024 or 16,384 codes of width 256.

Attention is in the last level only, as in the published models (16 x 16 of 256 x 256 pixels).
"""

from torch import Tensor

from modeling.tokenizers.vqgan import VQGAN, Names


class TamingVQGAN(VQGAN):
    """VQGAN with its original state-dict keys."""

    name = "taming VQGAN"
    names = Names("down", "up", True, "block", ("block_1", "attn_1", "block_2"))
    level_key = "encoder.down.{}.block.{}.conv2.weight"
    mid_key = "encoder.mid.block_1.norm1.weight"

    @classmethod
    def weights_of(cls, state: dict[str, Tensor], source: object) -> dict[str, Tensor]:
        # The file also has the perceptual network and the discriminator.
        return {key: value for key, value in state.items() if not key.startswith("loss.")}
