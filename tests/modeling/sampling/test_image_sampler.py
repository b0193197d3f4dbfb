"""The inputs of image i, and the decoding of codes to bytes."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from modeling.orders import random_orders
from modeling.rear import ReAR
from modeling.sampling.image_sampler import (
    ImageDecoder,
    asked_images,
    class_labels_of,
    image_inputs,
    image_orders,
    indices_of_classes,
)
from modeling.tokenizers.conv_layers import fold_upsampling
from modeling.tokenizers.maskgit_vq import MaskGitVQ
from utils.images import to_uint8
from utils.randomness import Stream, image_uniforms
from utils.schema import SamplingConfig, VQModelConfig


def test_classes_alternate() -> None:
    labels = class_labels_of(range(12), num_classes=5)
    assert labels.dtype == np.int64
    assert labels.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert indices_of_classes(range(5), 12, num_classes=5) == list(range(12))
    indices = indices_of_classes([4, 1], 5, num_classes=5)
    assert class_labels_of(indices, 5).tolist() == [4, 1, 4, 1, 4]
    for class_label in (1, 4):
        of_class = [index for index in indices if index % 5 == class_label]
        assert of_class == np.flatnonzero(class_labels_of(range(20), 5) == class_label)[: len(of_class)].tolist()


def test_so_many_in_all_or_of_each_class() -> None:
    assert asked_images(SamplingConfig(num_fid_samples=3), [4, 1], 5) == [4, 1, 9]
    assert asked_images(SamplingConfig(images_per_class=2), [4, 1], 5) == [4, 1, 9, 6]


def test_an_images_inputs_do_not_depend_on_the_others(tiny_model: ReAR) -> None:
    labels, uniforms = image_inputs([7, 3], tiny_model, seed=9)
    assert labels.tolist() == [2, 3]
    assert labels.dtype == torch.int64
    assert torch.equal(uniforms, image_uniforms(9, [7, 3], 16))
    assert torch.equal(image_inputs([3], tiny_model, seed=9)[1], uniforms[1:])


def test_orders_are_those_of_seed_and_index() -> None:
    sampling = SamplingConfig(seed=9, order="random")
    orders = image_orders([7, 3], 16, sampling)
    assert torch.equal(orders, random_orders(image_uniforms(9, [7, 3], 16, Stream.SAMPLING_ORDERS)))
    assert torch.equal(image_orders([3], 16, sampling), orders[1:])
    assert not torch.equal(orders, random_orders(image_uniforms(9, [7, 3], 16)))
    assert image_orders([3], 16, SamplingConfig()) is None


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
