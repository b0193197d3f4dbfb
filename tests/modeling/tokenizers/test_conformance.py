"""The contract of all tokenizers; a new one adds its line to SIZES."""

import copy
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from modeling.sampling.image_sampler import ImageDecoder
from modeling.tokenizers.registry import TOKENIZERS, build_tokenizer, code_shape, config_from_state_dict
from modeling.tokenizers.tokenizer import Tokenizer
from utils.config import load_config
from utils.errors import InputError
from utils.files.weights import save_weights
from utils.images import to_uint8
from utils.keys import keys_of
from utils.schema import TokenizerConfig, VQModelConfig

SMALL = VQModelConfig(
    codebook_size=32, token_size=8, resolution=32, hidden_channels=12, channel_mult=[1, 2, 3], num_res_blocks=1
)
SIZES = {
    "maskgit_vq": SMALL,
    "llamagen_vq": replace(SMALL, model_type="llamagen_vq", z_channels=16),
    "taming_vqgan": replace(SMALL, model_type="taming_vqgan", z_channels=16),
    "patch_vq": replace(SMALL, model_type="patch_vq", channel_mult=[1, 1, 1]),
    "vqplus": replace(SMALL, model_type="vqplus"),
    "vqplus with signs": replace(SMALL, model_type="vqplus", quantizer_type="lookup-free", token_size=5),
    "titok": VQModelConfig(
        model_type="titok",
        codebook_size=32,
        token_size=8,
        num_latent_tokens=10,
        resolution=32,
        hidden_channels=12,
        channel_mult=[1, 1, 2, 2],
        num_res_blocks=1,
        use_l2_norm=True,
        vit_enc_model_size="tiny",
        vit_dec_model_size="tiny",
        vit_enc_patch_size=8,
        vit_dec_patch_size=8,
    ),
    "codes_only": VQModelConfig(model_type="codes_only", codebook_size=32, token_size=8),
}


class ToyTokenizer(Tokenizer):
    """The codebook holds colours; a code is the colour nearest to the mean of its 4 x 4 pixels."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__(config)
        self.colours = nn.Parameter(torch.rand(config.codebook_size, 3))

    @property
    def code_shape(self) -> tuple[int, ...]:
        return self.resolution // 4, self.resolution // 4

    @classmethod
    def config_from_state_dict(cls, state: dict[str, Tensor]) -> TokenizerConfig:
        if [*state] != ["colours"]:
            raise InputError("no tokenizer of colours")
        return TokenizerConfig(codebook_size=len(state["colours"]), token_size=3)

    @property
    def decoder_activations(self) -> int:
        return 3 * self.resolution**2

    def encode_latents(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images, 4).flatten(2).mT

    def quantize_latents(self, features: Tensor) -> Tensor:
        return torch.cdist(features, self.colours).argmin(dim=-1)

    def codebook_lookup(self, codes: Tensor) -> Tensor:
        return self.colours[codes]

    def _decode(self, codes: Tensor) -> Tensor:
        grid = self.colours[codes].mT.unflatten(2, (self.resolution // 4, self.resolution // 4))
        return grid.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)


class WithoutGrid(ToyTokenizer):
    @property
    def code_shape(self) -> tuple[int, ...]:
        return ((self.resolution // 4) ** 2,)


class EmbedsTheNextCode(ToyTokenizer):
    def codebook_lookup(self, codes: Tensor) -> Tensor:
        return super().codebook_lookup((codes + 1) % self.codebook_size)


class CountsFromOne(ToyTokenizer):
    def quantize_latents(self, features: Tensor) -> Tensor:
        return super().quantize_latents(features) + 1


class Transposed(ToyTokenizer):
    def _decode(self, codes: Tensor) -> Tensor:
        return super()._decode(codes).mT


class SharesItsWeights(ToyTokenizer):
    def fast_decoder(self) -> nn.Module:
        return self

    def forward(self, codes: Tensor) -> Tensor:
        return self.decode_unclamped(codes)


TOY_SIZES = TokenizerConfig(codebook_size=16, token_size=3, resolution=12)


def check_all(tokenizer: Tokenizer) -> None:
    if tokenizer.has_images:
        check_codes(tokenizer)
        check_images(tokenizer)
        if len(tokenizer.code_shape) == 2:
            check_raster_order(tokenizer)
        check_fast_decoder(tokenizer)
    else:
        check_refusals(tokenizer)
    check_vectors(tokenizer)
    check_hash(tokenizer)


def check_vectors(tokenizer: Tokenizer) -> None:
    codes = random_codes(tokenizer, 3)
    vectors = tokenizer.codebook_lookup(torch.arange(tokenizer.codebook_size)[None])  # (1, V, Z)
    assert vectors.dtype == torch.float32
    assert tokenizer.codebook_lookup(codes).shape == (3, tokenizer.image_seq_len, tokenizer.codebook_dim)
    assert torch.equal(tokenizer.codebook_lookup(codes), vectors[0, codes])  # at every position


def check_refusals(tokenizer: Tokenizer) -> None:
    images = torch.rand(1, 3, tokenizer.resolution, tokenizer.resolution)
    for refused in (lambda: tokenizer.encode(images), lambda: tokenizer.decode(random_codes(tokenizer, 1))):
        with pytest.raises(InputError, match="model_type=codes_only"):
            refused()


def check_codes(tokenizer: Tokenizer) -> None:
    images = torch.rand(3, 3, tokenizer.resolution, tokenizer.resolution)
    codes = tokenizer.encode(images)
    assert codes.dtype == torch.int64
    assert codes.shape == (3, tokenizer.image_seq_len)
    assert codes.min() >= 0
    assert codes.max() < tokenizer.codebook_size
    features = tokenizer.encode_latents(images)
    assert features.shape == (3, tokenizer.image_seq_len, tokenizer.codebook_dim)
    assert torch.equal(tokenizer.quantize_latents(features), codes)
    everything = torch.arange(tokenizer.codebook_size)[None]
    assert torch.equal(tokenizer.quantize_latents(tokenizer.codebook_lookup(everything)), everything)
    for edge in (tokenizer.resolution - 1, tokenizer.resolution + 1):
        with pytest.raises(ValueError, match="expected"):
            tokenizer.encode(torch.rand(1, 3, tokenizer.resolution, edge))
    for wrong in (images * 2 - 1, images * 255, (images * 255).byte(), images / 0):
        with pytest.raises(ValueError, match=r"images .*: expected"):
            tokenizer.encode(wrong)
    assert torch.equal(tokenizer.encode(images.double()), codes)


def check_images(tokenizer: Tokenizer) -> None:
    codes = random_codes(tokenizer, 3)
    images = tokenizer.decode(codes)
    assert images.shape == (3, 3, tokenizer.resolution, tokenizer.resolution)
    assert images.dtype == torch.float32
    assert torch.equal(images, tokenizer.decode_unclamped(codes).clamp(0, 1))
    torch.testing.assert_close(tokenizer.decode(codes.flip(0)), images.flip(0))  # each image from its own codes
    for wrong in (codes[:, 1:], codes.float(), codes - tokenizer.codebook_size, codes + tokenizer.codebook_size):
        with pytest.raises(ValueError, match=r"codes .*: expected"):
            tokenizer.decode(wrong)


def check_raster_order(tokenizer: Tokenizer) -> None:
    """Another code changes the image most in the region of that code, other pixels the features of theirs.

    Or in a region near to it: the weights are random, and convolutions reach far and at the border see padding.
    """
    rows, columns = tokenizer.code_shape
    edge = tokenizer.resolution // rows
    codes, images = random_codes(tokenizer, 16), torch.rand(16, 3, tokenizer.resolution, tokenizer.resolution)
    for row, column in ((0, columns - 1), (rows - 1, 0), (rows // 2, columns // 2)):
        changed = codes.clone()
        changed[:, row * columns + column] += 1 + torch.arange(16) % (tokenizer.codebook_size - 1)
        changed %= tokenizer.codebook_size
        difference = tokenizer.decode_unclamped(changed) - tokenizer.decode_unclamped(codes)
        by_region = nn.functional.avg_pool2d(difference.abs(), edge).mean(dim=(0, 1))  # (rows, columns)
        assert near(by_region, row, column)

        repainted = images.clone()
        repainted[:, :, row * edge : (row + 1) * edge, column * edge : (column + 1) * edge] = torch.rand(3, 1, 1)
        difference = tokenizer.encode_latents(repainted) - tokenizer.encode_latents(images)
        assert near(difference.abs().mean(dim=(0, 2)).unflatten(0, (rows, columns)), row, column)


def near(by_region: Tensor, row: int, column: int) -> bool:
    """Whether the centre of mass of (rows, columns) is at most 2/5 of their number away."""
    for place, mass in ((row, by_region.sum(dim=1)), (column, by_region.sum(dim=0))):
        offset = (mass * (torch.arange(len(mass)) - len(mass) // 2)).sum() / mass.sum()
        if abs(offset - (place - len(mass) // 2)) > len(mass) / 2.5:
            return False
    return True


def check_fast_decoder(tokenizer: Tokenizer) -> None:
    codes = random_codes(tokenizer, 3)
    fast = tokenizer.fast_decoder()
    torch.testing.assert_close(fast(codes), tokenizer.decode_unclamped(codes), atol=1e-4, rtol=1e-4)
    sha256 = tokenizer.sha256()
    assert fast.to(torch.float16)(codes).dtype == torch.float16
    assert tokenizer.sha256() == sha256
    decoder, wanted = ImageDecoder(tokenizer, "round"), to_uint8(tokenizer.decode(codes), "round")
    assert abs(decoder.finish(decoder.start(codes)).astype(int) - wanted).max() <= 1
    assert tokenizer.decoder_activations >= 3 * tokenizer.resolution**2


def check_hash(tokenizer: Tokenizer) -> None:
    sha256, other = tokenizer.sha256(), copy.deepcopy(tokenizer)
    assert len(sha256) == 64
    tokenizer.codebook_lookup(random_codes(tokenizer, 1))
    assert tokenizer.sha256() == other.sha256() == sha256
    next(other.parameters()).flatten()[0] += 1
    assert other.sha256() != sha256


def random_codes(tokenizer: Tokenizer, count: int) -> Tensor:
    return torch.randint(tokenizer.codebook_size, (count, tokenizer.image_seq_len))


def frozen(tokenizer: Tokenizer) -> Tokenizer:
    return tokenizer.eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_tokenizer_conforms(sizes: VQModelConfig) -> None:
    tokenizer = frozen(build_tokenizer(sizes))
    check_all(tokenizer)
    assert (tokenizer.codebook_size, tokenizer.codebook_dim) == (sizes.codebook_size, sizes.token_size)
    assert tokenizer.code_shape == code_shape(sizes)
    assert type(tokenizer.config) is tokenizer.config_class


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_sizes_are_read_from_the_weights(sizes: VQModelConfig) -> None:
    found = config_from_state_dict(build_tokenizer(sizes).state_dict())
    assert replace(found, resolution=sizes.resolution) == sizes


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_weights_are_read_back(sizes: VQModelConfig, tmp_path: Path) -> None:
    """None of them is left out or renamed on the way."""
    ours, other = build_tokenizer(sizes), build_tokenizer(sizes)
    save_weights(ours.state_dict(), tmp_path / "weights.safetensors")
    other.load_weights(tmp_path / "weights.safetensors")
    assert other.sha256() == ours.sha256()


@pytest.mark.parametrize("tokenizer_class", [ToyTokenizer, WithoutGrid])
def test_a_toy_tokenizer_conforms(tokenizer_class: type[Tokenizer]) -> None:
    check_all(frozen(tokenizer_class(TOY_SIZES)))


@pytest.mark.parametrize("tokenizer_class", [EmbedsTheNextCode, CountsFromOne, Transposed, SharesItsWeights])
def test_a_broken_tokenizer_does_not(tokenizer_class: type[Tokenizer]) -> None:
    with pytest.raises(AssertionError):
        check_all(frozen(tokenizer_class(TOY_SIZES)))


def test_the_table_enters_everything_that_goes_by_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TOKENIZERS, "toy", ToyTokenizer)
    config = VQModelConfig(**asdict(replace(TOY_SIZES, model_type="toy")))
    toy = build_tokenizer(config)
    assert isinstance(toy, ToyTokenizer)
    assert code_shape(config) == toy.code_shape == (3, 3)
    assert config_from_state_dict(toy.state_dict()).model_type == "toy"


def test_the_config_names_the_tokenizers_of_the_table() -> None:
    for model_type in TOKENIZERS:
        config = load_config(["experiment.output_dir=unused", f"model.vq_model.model_type={model_type}"])
        assert config.model.vq_model.model_type == model_type
    choices = keys_of(VQModelConfig)["model_type"].choices
    assert set(choices) == set(TOKENIZERS) == {sizes.model_type for sizes in SIZES.values()}
