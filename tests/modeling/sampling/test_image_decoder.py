import copy

import numpy as np
import pytest
import torch
from torch import nn

from modeling.sampling.image_decoder import ImageDecoder
from modeling.tokenizers.conv_layers import fold_upsampling
from modeling.tokenizers.maskgit_vq import MaskGitVQ
from utils.images import to_uint8
from utils.schema import VQModelConfig


@pytest.fixture(scope="module")
def tokenizer() -> MaskGitVQ:
    torch.manual_seed(0)
    config = VQModelConfig(
        codebook_size=32, token_size=8, resolution=32, hidden_channels=12, channel_mult=[1, 2, 3], num_res_blocks=1
    )
    return MaskGitVQ(config).eval().requires_grad_(False)


@pytest.fixture
def codes() -> torch.Tensor:
    return torch.randint(0, 32, (5, 64), generator=torch.Generator().manual_seed(0))


def decode(decoder: ImageDecoder, codes: torch.Tensor) -> np.ndarray:
    return decoder.finish(decoder.start(codes))


def test_folded_upsampling_is_the_same_function(tokenizer: MaskGitVQ) -> None:
    """Borders included; the original keeps its form and its keys."""
    keys = {key: value.shape for key, value in tokenizer.state_dict().items()}
    folded = fold_upsampling(tokenizer.decoder)
    kinds = [type(level.upsample_conv) for level in folded.up]
    assert kinds == [type(None), nn.ConvTranspose2d, nn.ConvTranspose2d]
    features = torch.randn(2, 8, 8, 8)
    torch.testing.assert_close(folded(features), tokenizer.decoder(features), atol=1e-4, rtol=1e-4)
    assert {key: value.shape for key, value in tokenizer.state_dict().items()} == keys


@pytest.mark.parametrize("rule", ["truncate", "round"])
def test_bytes_are_the_tokenizers(tokenizer: MaskGitVQ, codes: torch.Tensor, rule: str) -> None:
    images = decode(ImageDecoder(tokenizer, rule), codes)
    wanted = to_uint8(tokenizer.decode(codes), rule)
    assert images.shape == (5, 32, 32, 3)
    assert np.abs(images.astype(int) - wanted).max() <= 1
    assert (images == wanted).mean() > 0.99


def test_bytes_do_not_depend_on_the_batch(tokenizer: MaskGitVQ, codes: torch.Tensor) -> None:
    decoder = ImageDecoder(tokenizer, "truncate")
    one_by_one = np.concatenate([decode(decoder, code) for code in codes.split(1)])
    np.testing.assert_array_equal(decode(decoder, codes), one_by_one)


def test_float16_is_as_good(tokenizer: MaskGitVQ, codes: torch.Tensor) -> None:
    half = decode(ImageDecoder(tokenizer, "round", torch.float16), codes)
    exact = decode(ImageDecoder(tokenizer, "round"), codes)
    assert np.abs(half.astype(float) - exact).mean() < 0.15
    assert next(tokenizer.parameters()).dtype == torch.float32


def test_what_leaves_the_range_of_float16_is_decoded_in_float32(tokenizer: MaskGitVQ, codes: torch.Tensor) -> None:
    large = copy.deepcopy(tokenizer)
    large.decoder.conv_in.weight.mul_(1e7)  # the norm that follows takes it back
    half, exact = (ImageDecoder(large, "round", dtype) for dtype in (torch.float16, torch.float32))
    assert not half.start(codes).wait()
    np.testing.assert_array_equal(decode(half, codes), decode(exact, codes))
