"""LlamaGen's tokenizer (https://arxiv.org/abs/2406.06525): VQGAN's network, 16,384 codes of width 8 on a sphere.

Published are f16 (`vq_ds16_c2i.pt`, channel_mult [1, 1, 2, 2, 4]) and f8 (`vq_ds8_c2i.pt`, [1, 2, 2, 4]).
"""

from torch import Tensor

from modeling.tokenizers.vector_quantizer import CosineQuantizer
from modeling.tokenizers.vqgan import VQGAN, Names

USED_CODES = "quantize.codebook_used"  # the last 65,536 codes of the training; in some files


class LlamaGenVQ(VQGAN):
    """VQGAN with a codebook of unit vectors."""

    name = "LlamaGen"
    names = Names("conv_blocks", "conv_blocks", False, "res", ("0", "1", "2"))
    level_key = "encoder.conv_blocks.{}.res.{}.conv2.weight"
    mid_key = "encoder.mid.0.norm1.weight"
    quantizer = CosineQuantizer

    @classmethod
    def weights_of(cls, state: dict[str, Tensor], source: object) -> dict[str, Tensor]:
        return {key: value for key, value in state.items() if key != USED_CODES}
