"""TiTok computes the published function: numbers of the published code, with made-up small and with formula weights."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from modeling.tokenizers import conv_layers, titok
from modeling.tokenizers.registry import config_from_state_dict
from modeling.tokenizers.titok import TiTokVQ
from tests.modeling.tokenizers.made_up import formula_images, set_formula_weights
from utils.errors import InputError
from utils.files.weights import weights_sha256
from utils.schema import VQModelConfig

FIXTURES = Path(__file__).parents[2] / "fixtures/tokenizers"
LEGACY = {"codebook_size": 4096, "token_size": 12}
LATER = {"codebook_size": 8192, "token_size": 64, "is_legacy": False, "use_l2_norm": False}
PUBLISHED = {
    "l32": {**LEGACY, "num_latent_tokens": 32, "vit_enc_model_size": "large", "vit_dec_model_size": "large"},
    "b64": {**LEGACY, "num_latent_tokens": 64},
    "s128": {**LEGACY, "num_latent_tokens": 128, "vit_enc_model_size": "small", "vit_dec_model_size": "small"},
    "bl64_vq8k": {**LATER, "num_latent_tokens": 64, "vit_dec_model_size": "large"},
    "bl128_vq8k": {**LATER, "num_latent_tokens": 128, "vit_dec_model_size": "large"},
    "sl256_vq8k": {**LATER, "num_latent_tokens": 256, "vit_enc_model_size": "small", "vit_dec_model_size": "large"},
}
PIXEL_DECODER = {"hidden_channels": 32, "channel_mult": [1, 1, 1, 2], "num_res_blocks": 1}
TINY = {"titok_tiny": PIXEL_DECODER, "titok_tiny_2d_free": {}}  # what its config does not say


def arrays_of(path: Path) -> dict[str, Tensor]:
    with np.load(path) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def config_of(name: str) -> VQModelConfig:
    published = json.loads((FIXTURES / name / "config.json").read_text())["model"]["vq_model"]
    for key in ("commitment_cost", "finetune_decoder"):  # nothing reads them
        del published[key]
    sizes = {"vit_enc_model_size": "tiny", "vit_dec_model_size": "tiny", "resolution": 32}
    return VQModelConfig(model_type="titok", **{**published, **sizes, **TINY[name]})


@pytest.mark.parametrize("is_legacy", [True, False])
def test_the_hash_tells_another_normalization(is_legacy: bool) -> None:
    """It decides codes and images, and the weights do not show it."""
    sizes = PIXEL_DECODER if is_legacy else {}
    config = VQModelConfig(
        **{"model_type": "titok", "is_legacy": is_legacy, "num_latent_tokens": 4, "resolution": 32, **sizes},
        **{"vit_enc_model_size": "tiny", "vit_dec_model_size": "tiny", "vit_dec_patch_size": 8},
        use_l2_norm=is_legacy,
    )
    usual = TiTokVQ.from_section(config)
    other = TiTokVQ.from_section(replace(config, use_l2_norm=not is_legacy))
    other.load_state_dict(usual.state_dict())
    assert usual.sha256() == weights_sha256(usual)  # as in the stores of earlier versions
    assert other.sha256() != usual.sha256()


def check(model: TiTokVQ, expected: dict[str, Tensor], images: Tensor, every: int) -> None:
    """
    Args:
        every: pixels that the expected images hold, in both directions.
    """
    features = model.encode_latents(images)
    torch.testing.assert_close(features.mT, expected["features"], atol=1e-4, rtol=0)
    clear = expected["margins"] > 1e-4
    assert clear.float().mean() > 0.9
    codes = model.encode(images)
    assert torch.equal(codes[clear], expected["codes"][clear])
    embedded = model.codebook_lookup(expected["decode_ids"])
    torch.testing.assert_close(embedded[:, : expected["embed"].shape[1]], expected["embed"], atol=1e-4, rtol=0)
    for name, shown in (("decoded_unclamped", expected["decode_ids"]), ("reconstruction", expected["codes"])):
        pixels = model.decode_unclamped(shown)[..., ::every, ::every]
        torch.testing.assert_close(pixels, expected[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_tiny(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(titok, "PIXEL_CODEBOOK", (64, 16))
    monkeypatch.setattr(conv_layers, "MIN_GROUP_WIDTH", 1)  # 32 groups in levels of 32 channels
    config, state = config_of(name), load_file(FIXTURES / name / "weights.safetensors")
    model, expected = TiTokVQ(config).eval(), arrays_of(FIXTURES / name / "expected.npz")
    model.load_state_dict(state)
    check(model, expected, expected["images"], 1)
    if model.is_legacy:
        logits = model.decoder(model.codebook_lookup(expected["decode_ids"]))
        torch.testing.assert_close(logits, expected["pixel_code_logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(model.fast_decoder()(expected["codes"]), expected["reconstruction"], atol=1e-4, rtol=0)
    assert config_from_state_dict(state) == config


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_of_the_published_files(name: str) -> None:
    config = VQModelConfig(model_type="titok", **PUBLISHED[name])
    with torch.device("meta"):
        model = TiTokVQ(config)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    lines = (FIXTURES / f"titok/keys_{name}.txt").read_text().splitlines()
    wanted = {key: tuple(map(int, numbers)) for key, *numbers in map(str.split, lines)}
    assert shapes == wanted
    assert config_from_state_dict(model.state_dict()) == config


@pytest.mark.slow  # most of the time goes into drawing the weights
@pytest.mark.parametrize("name", ["b64", "s128"])
@torch.no_grad()
def test_full_size(name: str) -> None:
    expected = arrays_of(FIXTURES / f"titok/expected_{name}.npz")
    model, seed = TiTokVQ(VQModelConfig(model_type="titok", **PUBLISHED[name])).eval(), int(expected["seed"])
    set_formula_weights(model, seed)
    images = formula_images(seed, 1, 256)
    torch.testing.assert_close(images[0, :, 0, :4], expected["image_head"])
    check(model, expected, images, 4)
    logits = model.decoder(model.codebook_lookup(expected["decode_ids"]))[:, ::64]
    torch.testing.assert_close(logits, expected["pixel_code_logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vit_enc_patch_size": 12}, "resolution=256: expected a multiple of vit_enc_patch_size=12"),
        ({"hidden_channels": 2}, "hidden_channels=2: expected a multiple of 4"),
        ({"vit_dec_patch_size": 8}, r"vit_dec_patch_size=8: expected 16 \(5 levels in channel_mult\)"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TiTokVQ(VQModelConfig(model_type="titok", **changes))
