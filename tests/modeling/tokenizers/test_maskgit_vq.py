"""The tokenizer computes the published function: numbers of the published code with formula weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from modeling.loading import load_tokenizer
from modeling.tokenizers.maskgit_vq import MaskGitVQ
from tests.modeling.tokenizers.made_up import formula_weight
from utils.errors import InputError
from utils.schema import Config, ExperimentConfig, ModelConfig, VQModelConfig

FIXTURES = Path(__file__).parents[2] / "fixtures"
SMALL = VQModelConfig(
    codebook_size=32,
    token_size=8,
    num_latent_tokens=16,
    resolution=16,
    hidden_channels=12,
    channel_mult=[1, 2, 3],
    num_res_blocks=1,
)


@pytest.fixture(scope="module")
def published() -> MaskGitVQ:
    model = MaskGitVQ(VQModelConfig()).eval().requires_grad_(False)
    model.load_state_dict({key: formula_weight(key, tuple(value.shape)) for key, value in model.state_dict().items()})
    return model


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    with np.load(FIXTURES / "maskgitvq_expected.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture
def small() -> MaskGitVQ:
    torch.manual_seed(0)
    return MaskGitVQ(SMALL)


def small_config(path: Path) -> Config:
    return Config(
        experiment=ExperimentConfig(output_dir="unused", tokenizer_checkpoint=str(path)),
        model=ModelConfig(vq_model=SMALL),
    )


def test_keys_and_shapes(published: MaskGitVQ) -> None:
    lines = (FIXTURES / "maskgitvq_keys.txt").read_text().splitlines()
    wanted = dict(line.split(" ", 1) for line in lines)
    state = published.state_dict()
    assert {key: str(tuple(value.shape)) for key, value in state.items()} == wanted
    assert sum(value.numel() for value in state.values()) == 54_515_587
    assert (published.codebook_size, published.codebook_dim, published.image_seq_len) == (1024, 256, 256)


def test_encoder_and_codes(published: MaskGitVQ, expected: dict[str, Tensor]) -> None:
    images = expected["image"][None]
    torch.testing.assert_close(published.encoder(images)[0], expected["encoder_out"], atol=1e-3, rtol=0)
    codes = published.encode(images)
    assert codes.dtype == torch.int64
    assert (codes == expected["codes"]).float().mean() >= 0.99


def test_decoder(published: MaskGitVQ, expected: dict[str, Tensor]) -> None:
    codes = expected["decode_ids"].long()
    decoded = published.decode_unclamped(codes)[0, :, ::4, ::4]
    torch.testing.assert_close(decoded, expected["decoded_unclamped"], atol=1e-3, rtol=0)
    torch.testing.assert_close(published.codebook_lookup(codes)[0, :4], expected["features_row0"], atol=0, rtol=0)


def test_small_shapes(small: MaskGitVQ) -> None:
    images = torch.rand(2, 3, 16, 16)
    codes = small.encode(images)
    assert codes.shape == (2, 16)
    assert small.codebook_lookup(codes).shape == (2, 16, 8)
    decoded = small.decode(codes)
    assert decoded.shape == images.shape
    assert decoded.min() >= 0
    assert decoded.max() <= 1
    with pytest.raises(ValueError, match=r"\(2, 3, 16, 8\): expected \(B, 3, 16, 16\)"):
        small.encode(images[..., :8])
    with pytest.raises(ValueError, match=r"\(2, 15\): expected \(B, 16\)"):
        small.decode(codes[:, 1:])


def test_codes_are_in_raster_order(small: MaskGitVQ) -> None:
    codes = torch.arange(16)[None]
    grid = small.codebook_lookup(codes).reshape(1, 4, 4, 8).permute(0, 3, 1, 2)
    assert torch.equal(small.quantize(grid).codes, codes)


def test_nearest_is_the_nearest(small: MaskGitVQ) -> None:
    features = torch.randn(2, 16, 8)
    distances = torch.cdist(features, small.quantize.embedding.weight)
    assert torch.equal(small.quantize.nearest(features), distances.argmin(dim=-1))


def test_gradients_of_training(small: MaskGitVQ) -> None:
    reconstructed, quantizer = small(torch.rand(2, 3, 16, 16))
    torch.testing.assert_close(reconstructed, small.decode_unclamped(quantizer.codes))
    reconstructed.square().mean().backward()  # straight through: reaches the encoder, not the codebook
    assert small.encoder.conv_in.weight.grad.abs().max() > 0
    assert small.quantize.embedding.weight.grad is None
    quantizer.codebook_loss.backward()
    assert small.quantize.embedding.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_channels": 10}, "hidden_channels=10: expected a multiple of 4"),
        ({"resolution": 18}, r"resolution=18: expected a multiple of 4 \(3 levels"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MaskGitVQ(VQModelConfig(**{**vars(SMALL), **changes}))


@pytest.mark.parametrize("name", ["tokenizer.bin", "tokenizer.safetensors"])
def test_load_tokenizer(tmp_path: Path, small: MaskGitVQ, name: str) -> None:
    half = {key: value.half() for key, value in small.state_dict().items()}
    (torch.save if name.endswith(".bin") else save_file)(half, tmp_path / name)
    loaded = load_tokenizer(small_config(tmp_path / name))
    assert not loaded.training
    assert all(not p.requires_grad and p.dtype == torch.float32 for p in loaded.parameters())
    torch.testing.assert_close(
        loaded.codebook_lookup(torch.arange(16)[None]), small.codebook_lookup(torch.arange(16)[None]).half().float()
    )


def test_load_tokenizer_of_another_size(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.safetensors"
    other = MaskGitVQ(VQModelConfig(**{**vars(SMALL), "codebook_size": 64, "num_res_blocks": 2}))
    save_file(other.state_dict(), path)
    with pytest.raises(InputError, match=r"48 unexpected \(.*\(64, 8\) instead of \(32, 8\)"):
        load_tokenizer(small_config(path))
