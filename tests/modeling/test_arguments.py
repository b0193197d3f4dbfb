"""Arguments that callers from Python may pass, and those that are errors instead of wrong images."""

import dataclasses
from typing import Any

import pytest
import torch

from evaluation.validator import save_sample_grid
from modeling.rear import ReAR
from modeling.sampling.generate import CodeSampler, generate
from modeling.sampling.image_sampler import ImageDecoder, exact_samples, indices_of_classes
from modeling.tokenizers.maskgit_vq import MaskGitVQ
from tests.modeling.tokenizers.test_conformance import SIZES
from utils.config import load_config
from utils.errors import NonFiniteError
from utils.images import to_uint8
from utils.keys import ConfigError
from utils.randomness import image_uniforms
from utils.schema import ModelConfig

LABELS, UNIFORMS = torch.tensor([0, 4]), image_uniforms(0, [0, 1], 16)


@pytest.fixture
def tokenizer() -> MaskGitVQ:
    torch.manual_seed(0)
    return MaskGitVQ(SIZES["maskgit_vq"]).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, -1]), "class_labels with -1: expected"),
        (torch.tensor([0, 6]), "class_labels with 6: expected .* from 0 to 4, or 5 for the null class"),
        (torch.tensor([False, True]), "class_labels of torch.bool"),
        (torch.tensor([0.0, 1.0]), "class_labels of torch.float32"),
        (torch.tensor([[0, 1]]), r"shape \(1, 2\)"),
        (torch.tensor(1), r"shape \(\)"),
        ([0, 1], "class_labels in a list"),
    ],
)
def test_class_labels(tiny_model: ReAR, tiny_config: ModelConfig, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(tiny_model, labels, UNIFORMS, tiny_config.generator)
    with pytest.raises(ValueError, match=message):
        tiny_model(torch.zeros(2, 16, dtype=torch.int64), labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_narrow_integers_are_the_same_numbers(tiny_model: ReAR, tiny_config: ModelConfig, dtype: torch.dtype) -> None:
    """V + 1 + label must not wrap around."""
    tiny_config = dataclasses.replace(
        tiny_config, vq_model=dataclasses.replace(tiny_config.vq_model, codebook_size=255)
    )
    model, codes = ReAR(tiny_config).eval(), torch.arange(32).view(2, 16)
    assert torch.equal(model(codes.to(dtype), LABELS.to(dtype)).logits, model(codes, LABELS).logits)
    wanted = generate(model, LABELS, UNIFORMS, tiny_config.generator)
    assert torch.equal(generate(model, LABELS.to(dtype), UNIFORMS, tiny_config.generator), wanted)


def test_the_null_class_has_a_name(tiny_model: ReAR, tiny_config: ModelConfig) -> None:
    """With and without guidance, and with all classes in one batch."""
    assert tiny_model.null_class == tiny_model.num_classes == 5
    labels = torch.tensor([0, 1, 2, 3, 4, tiny_model.null_class, 0])
    uniforms = image_uniforms(0, [0] * 7, 16)
    for scale in (1.0, 3.0):
        config = dataclasses.replace(tiny_config.generator, guidance_scale=scale)
        codes = generate(tiny_model, labels, uniforms, config)
        assert torch.equal(codes[5:6], generate(tiny_model, labels[5:6], uniforms[:1], config))
        assert torch.equal(codes[0], codes[6])


@pytest.mark.parametrize(
    ("uniforms", "message"),
    [
        (UNIFORMS[:1], r"shape \(1, 16\): expected \(2, 16\), floats in \[0, 1\)"),
        (UNIFORMS[:, :1], r"shape \(2, 1\)"),
        (torch.zeros(2, 16, dtype=torch.int64), "torch.int64"),
        (UNIFORMS - 1, "uniforms with -"),
        (torch.ones(2, 16), "uniforms with 1.0"),
        (torch.full((2, 16), 1 - 1e-12, dtype=torch.float64), "uniforms with 1.0"),  # as float32
        (UNIFORMS * torch.nan, "uniforms with nan"),
        (UNIFORMS.numpy(), "uniforms in a ndarray"),
    ],
)
def test_uniforms(tiny_model: ReAR, tiny_config: ModelConfig, uniforms: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(tiny_model, LABELS, uniforms, tiny_config.generator)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.full((2, 16), 25), r"codes with 25: expected \(B, 16\), integers from 0 to 24"),
        (torch.full((2, 16), -1), "codes with -1"),
        (torch.zeros(2, 15, dtype=torch.int64), r"shape \(2, 15\)"),
        (torch.zeros(2, 16), "torch.float32"),
    ],
)
def test_codes_of_the_model(tiny_model: ReAR, codes: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model(codes, LABELS)


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        (torch.arange(16).expand(3, -1), r"shape \(3, 16\): expected \(2, 16\), each of 0 to 15 once in every row"),
        (torch.zeros(2, 15, dtype=torch.int64), r"shape \(2, 15\)"),
        (torch.zeros(2, 16), "torch.float32"),
        (torch.arange(16).expand(2, -1) + 1, "orders with 16"),
        (torch.stack([torch.arange(16), torch.arange(16) // 2]), r"orders with \[0, 0, 1, 1"),
    ],
)
def test_orders(tiny_model: ReAR, tiny_config: ModelConfig, orders: torch.Tensor, message: str) -> None:
    tiny_config.generator.order = "random"
    with pytest.raises(ValueError, match=message):
        tiny_model(torch.zeros(2, 16, dtype=torch.int64), LABELS, orders)
    with pytest.raises(ValueError, match=message):
        generate(tiny_model, LABELS, UNIFORMS, tiny_config.generator, orders)


def test_orders_that_the_model_was_not_trained_for(tiny_model: ReAR, tiny_config: ModelConfig) -> None:
    orders = torch.arange(16).flip(0).expand(2, -1)
    with pytest.raises(ValueError, match=r"found code 15 before code 0, .* model\.generator\.order=raster"):
        generate(tiny_model, LABELS, UNIFORMS, tiny_config.generator, orders)
    with pytest.raises(
        ConfigError, match=r"sampling\.order=random: expected raster, .* model\.generator\.order=raster"
    ):
        load_config(["experiment.output_dir=unused", "sampling.order=random"])
    load_config(["experiment.output_dir=unused", "sampling.order=random", "model.generator.order=annealed"])


ALL, CODES = torch.ones(2, 16, dtype=torch.bool), torch.zeros(2, 16, dtype=torch.int64)


@pytest.mark.parametrize(
    ("codes", "mask", "message"),
    [
        (None, ALL, r"conditioning_codes in a NoneType: expected \(2, 16\), integers from 0 to 23"),
        (CODES, None, r"conditioning_mask in a NoneType: expected \(2, 16\), bool"),
        (CODES, ALL.float(), "conditioning_mask of torch.float32"),
        (CODES[:, 1:], ALL, r"conditioning_codes .* shape \(2, 15\)"),
        (CODES + 24, ALL, "conditioning_codes with 24"),
        (CODES.float(), ALL, "conditioning_codes of torch.float32"),
    ],
)
def test_conditioning_codes(tiny_model: ReAR, tiny_config: ModelConfig, codes: Any, mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(tiny_model, LABELS, UNIFORMS, tiny_config.generator, None, codes, mask)


def test_images_of_a_class_that_is_not_there() -> None:
    for label in (-1, 5):
        with pytest.raises(ValueError, match=f"class label {label}: expected 0 to 4"):
            indices_of_classes([0, label], 3, 5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("randomize_temperature", value) for value in (0.0, -1.0, 1e-40, float("nan"), float("inf"))),
        *(("top_p", value) for value in (0.0, -0.5, 1.5, float("nan"))),
        *(("guidance_scale", value) for value in (-1.0, 1e40, float("inf"), float("nan"))),
        *(("guidance_scale_pow", value) for value in (-1.0, float("nan"))),
        ("top_k", -1),
    ],
)
def test_values_of_sampling(tiny_model: ReAR, tiny_config: ModelConfig, key: str, value: float) -> None:
    """From Python as from the command line."""
    config = dataclasses.replace(tiny_config.generator, **{key: value})
    with pytest.raises(ValueError, match=rf"model\.generator\.{key}=.*: expected"):
        generate(tiny_model, LABELS, UNIFORMS, config)
    with pytest.raises(ValueError, match=rf"model\.generator\.{key}=.*: expected"):
        load_config(["experiment.output_dir=unused", f"model.generator.{key}={value}"])


def test_guidance_zero_is_none_as_published(tiny_model: ReAR, tiny_config: ModelConfig) -> None:
    of_zero, of_one = (
        generate(tiny_model, LABELS, UNIFORMS, dataclasses.replace(tiny_config.generator, guidance_scale=scale))
        for scale in (0.0, 1.0)
    )
    assert torch.equal(of_zero, of_one)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_precisions_work_or_say_so(tiny_model: ReAR, tokenizer: MaskGitVQ, tiny_config: Any, dtype: Any) -> None:
    codes, images = torch.randint(24, (2, 16)), torch.rand(2, 3, 32, 32)
    assert tiny_model.to(dtype)(codes, LABELS).logits.dtype == dtype
    with pytest.raises(ValueError, match=f"model in {dtype}: expected torch.float32"):
        CodeSampler(tiny_model, tiny_config.generator)
    codes = tokenizer.encode(images)
    tokenizer.to(dtype)
    assert (tokenizer.encode(images) == codes).float().mean() > 0.8
    decoder = ImageDecoder(tokenizer, "round")
    assert abs(to_uint8(tokenizer.decode(codes), "round").astype(int) - decoder.finish(decoder.start(codes))).max() < 8


def test_autocast_around_sampling_changes_nothing(
    tiny_model: ReAR, tokenizer: MaskGitVQ, tiny_config: ModelConfig
) -> None:
    codes = generate(tiny_model, LABELS, UNIFORMS, tiny_config.generator)
    decoder, of_images = ImageDecoder(tokenizer, "round"), torch.randint(32, (2, 64))
    images = decoder.finish(decoder.start(of_images))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(generate(tiny_model, LABELS, UNIFORMS, tiny_config.generator), codes)
        assert (decoder.finish(decoder.start(of_images)) == images).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.9)])
def test_logits_that_are_not_finite(
    tiny_model: ReAR, tokenizer: MaskGitVQ, tiny_config: ModelConfig, value: float, top_k: int, top_p: float
) -> None:
    config = dataclasses.replace(tiny_config.generator, top_k=top_k, top_p=top_p)
    tiny_model.embeddings.weight.data[25 + 4, 0] = value  # class 4 only
    with pytest.raises(NonFiniteError, match="the generator's logits are not finite"):
        generate(tiny_model, LABELS, UNIFORMS, config)
    codes = CodeSampler(tiny_model, dataclasses.replace(config, guidance_scale=3.0))(LABELS, UNIFORMS)
    assert (codes[0] < 24).all()
    assert (codes[1] == 24).all()
    with pytest.raises(ValueError, match="codes"):
        tokenizer.decode(codes)
    decoder, codes = ImageDecoder(tokenizer, "round"), torch.randint(32, (2, 64))
    codes[1, 5] = 32
    with pytest.raises(NonFiniteError, match="the generator's logits are not finite"):
        decoder.finish(decoder.start(codes))


def test_pixels_and_features_that_are_not_finite(tokenizer: MaskGitVQ) -> None:
    codes = torch.randint(32, (2, 64))
    tokenizer.decoder.conv_out.bias[0] = torch.nan
    for dtype in (torch.float32, torch.float16):
        decoder = ImageDecoder(tokenizer, "round", dtype)
        with pytest.raises(NonFiniteError, match="the tokenizer's pixels are not finite"):
            decoder.finish(decoder.start(codes))
    with pytest.raises(NonFiniteError, match="pixels of a batch are not finite"):
        to_uint8(tokenizer.decode(codes))
    tokenizer.encoder.conv_out.bias[0] = torch.inf
    with pytest.raises(NonFiniteError, match="the tokenizer's latents are not finite"):
        tokenizer.encode(torch.rand(2, 3, 32, 32))


def test_the_sample_grid_of_training_fails_in_the_same_way(tiny_model: ReAR) -> None:
    tokenizer = MaskGitVQ(dataclasses.replace(SIZES["maskgit_vq"], codebook_size=24, resolution=16)).eval()
    tiny_model.lm_head.bias.data[0] = torch.nan
    config = load_config(["experiment.output_dir=unused"])
    with pytest.raises(NonFiniteError, match="logits"):
        exact_samples(tiny_model, tokenizer, [0, 1], config)


def test_a_sample_grid_that_fails_leaves_the_dropout_of_training_on(tiny_model: ReAR) -> None:
    tokenizer = MaskGitVQ(dataclasses.replace(SIZES["maskgit_vq"], codebook_size=24, resolution=16)).eval()
    tiny_model.train().lm_head.bias.data[0] = torch.nan
    with pytest.raises(NonFiniteError, match="logits"):
        save_sample_grid(tiny_model, tokenizer, load_config(["experiment.output_dir=unused"]), 1)
    assert all(module.training for module in tiny_model.modules())
