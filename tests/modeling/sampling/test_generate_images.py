"""Images from Python: the arguments of `generate_images`, and what a reused sampler keeps."""

import copy
import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch

from modeling.rear import ReAR
from modeling.sampling.generate import CodeSampler
from modeling.sampling.generate_images import generate_images
from modeling.sampling.image_sampler import ImageSampler
from modeling.tokenizers.registry import build_tokenizer
from modeling.tokenizers.tokenizer import Tokenizer
from tests.modeling.tokenizers.test_conformance import SIZES
from utils.schema import Config, SamplingConfig


@pytest.fixture
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    return build_tokenizer(dataclasses.replace(SIZES["maskgit_vq"], codebook_size=24, resolution=16)).eval()


def test_image_i_is_that_of_index_i(tiny_model: ReAR, tokenizer: Tokenizer) -> None:
    of_indices = ImageSampler(tiny_model, tokenizer, Config(model=tiny_model.config), 12)(range(12))
    in_turns = [i % 5 for i in range(12)]
    for batch_size in (1, 5, 50):
        images = generate_images(tiny_model, tokenizer, in_turns, batch_size=batch_size)
        np.testing.assert_array_equal(images, of_indices)
    others = torch.tensor([4, 1, 0, 0], dtype=torch.int16)
    images = generate_images(tiny_model, tokenizer, others)
    np.testing.assert_array_equal(images[1], of_indices[1])
    assert not np.array_equal(images[0], of_indices[0])
    assert not np.array_equal(images[2], images[3])
    assert not np.array_equal(generate_images(tiny_model, tokenizer, in_turns, seed=1), of_indices)
    unconditional = generate_images(tiny_model, tokenizer, [tiny_model.null_class], guidance_scale=1)
    assert unconditional.shape == (1, 16, 16, 3)


SETTINGS = {
    "guidance_scale": ("guidance_scale", 1.5),
    "guidance_scale_pow": ("guidance_scale_pow", 0.0),
    "temperature": ("randomize_temperature", 0.5),
    "top_k": ("top_k", 2),
    "top_p": ("top_p", 0.5),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_those_of_the_config_or_given(tiny_model: ReAR, tokenizer: Tokenizer, name: str) -> None:
    key, value = SETTINGS[name]
    default, given = (generate_images(tiny_model, tokenizer, [0, 1, 2], **settings) for settings in ({}, {name: value}))
    assert not np.array_equal(default, given)
    tiny_model.config.generator = dataclasses.replace(tiny_model.config.generator, **{key: value})
    np.testing.assert_array_equal(generate_images(tiny_model, tokenizer, [0, 1, 2]), given)


def test_a_kept_sampler_prepares_only_what_it_must(
    tiny_model: ReAR, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, preparing is compiling and capturing."""
    prepared, prepare = [], CodeSampler._prepare
    monkeypatch.setattr(CodeSampler, "_prepare", lambda *arguments: prepared.append(1) or prepare(*arguments))
    kept = ImageSampler(tiny_model, tokenizer, Config(model=tiny_model.config), 2)
    for settings, expected in (
        ({}, 1),
        ({"seed": 3}, 1),
        ({"guidance_scale": 4.0, "guidance_scale_pow": 1.0}, 1),
        ({"temperature": 0.9}, 2),
        ({"temperature": 0.9, "guidance_scale": 1}, 3),
        ({"top_k": 3}, 4),
    ):
        images = generate_images(tiny_model, tokenizer, [3, 1, 2], sampler=kept, **settings)
        assert len(prepared) == expected, settings
        fresh = generate_images(tiny_model, tokenizer, [3, 1, 2], **settings)
        prepared.pop()
        np.testing.assert_array_equal(images, fresh)


@pytest.mark.parametrize("order", ["random", "annealed"])
def test_random_orders(tiny_model: ReAR, tokenizer: Tokenizer, order: Any) -> None:
    with pytest.raises(ValueError, match=r"expected raster order, as model.generator.order=raster"):
        generate_images(tiny_model, tokenizer, [0, 1], order="random")
    tiny_model.config.generator.order = order
    config = Config(model=tiny_model.config, sampling=SamplingConfig(order="random"))
    images = generate_images(tiny_model, tokenizer, [0, 1], order="random")
    np.testing.assert_array_equal(images, ImageSampler(tiny_model, tokenizer, config, 2)([0, 1]))
    assert not np.array_equal(images, generate_images(tiny_model, tokenizer, [0, 1]))


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        ([], {}, "class_labels=[]: expected at least one"),
        ([0, 6], {}, "class_labels with 6: expected (B,), integers from 0 to 4, or 5 for the null class"),
        ([0.5], {}, "class_labels of torch.float32 and shape (2,): expected"),
        ([0], {"guidance_scale": -1}, "model.generator.guidance_scale=-1: expected float >= 0"),
        ([0], {"temperature": 0}, "model.generator.randomize_temperature=0: expected float >= 1e-06"),
        ([0], {"top_p": float("nan")}, "model.generator.top_p=nan"),
        ([0], {"seed": -1}, "sampling.seed=-1"),
    ],
)
def test_wrong_arguments(
    tiny_model: ReAR, tokenizer: Tokenizer, labels: list[int], settings: dict[str, Any], message: str
) -> None:
    kept = ImageSampler(tiny_model, tokenizer, Config(model=tiny_model.config), 2)
    with pytest.raises(ValueError, match=re.escape(message)):
        generate_images(tiny_model, tokenizer, labels, sampler=kept, **settings)


def test_a_sampler_of_another_model(tiny_model: ReAR, tokenizer: Tokenizer) -> None:
    other = ImageSampler(copy.deepcopy(tiny_model), tokenizer, Config(model=tiny_model.config), 2)
    with pytest.raises(ValueError, match="sampler: of another model"):
        generate_images(tiny_model, tokenizer, [0], sampler=other)


def test_a_tokenizer_of_other_codes(tiny_model: ReAR) -> None:
    other = build_tokenizer(SIZES["maskgit_vq"])
    with pytest.raises(ValueError, match=r"\(64, 32\), expected the model's \(16, 24\)"):
        generate_images(tiny_model, other, [0])
