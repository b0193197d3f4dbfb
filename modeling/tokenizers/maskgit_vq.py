"""The MaskGIT-VQ tokenizer: a convolutional VQGAN without attention, images to codes and back.

The defaults of the config are the published f16 model (MaskGIT, https://arxiv.org/abs/2202.04200, in the PyTorch
port that RAR uses, `maskgit-vqgan-imagenet-f16-256.bin`); its state-dict keys are the keys in that file and never
change.
"""

from modeling.tokenizers.conv_tokenizer import CodebookTokenizer
from modeling.tokenizers.maskgit_layers import Decoder, Encoder
from modeling.tokenizers.vector_quantizer import VectorQuantizer
from utils.schema import ConvTokenizerConfig


class MaskGitVQ(CodebookTokenizer):
    """Images in [0, 1] without further normalization <-> codes in raster order."""

    name = "MaskGIT-VQ"
    level_key = "encoder.down.{}.block.{}.conv2.weight"
    mid_key = "encoder.mid.0.norm1.weight"

    def __init__(self, config: ConvTokenizerConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = VectorQuantizer(config.codebook_size, config.token_size)
