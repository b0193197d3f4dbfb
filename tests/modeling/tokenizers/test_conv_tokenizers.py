"""The convolutional tokenizers compute the published functions: numbers of the published code with formula weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from modeling.loading import load_tokenizer
from modeling.tokenizers import conv_layers
from modeling.tokenizers.conv_tokenizer import ConvTokenizer
from modeling.tokenizers.registry import build_tokenizer, config_from_state_dict
from modeling.tokenizers.tokenizer import TrainableTokenizer
from modeling.tokenizers.vector_quantizer import SignQuantizer, entropy_loss
from tests.modeling.tokenizers.made_up import formula_weight
from utils.errors import InputError
from utils.schema import Config, ExperimentConfig, ModelConfig, VQModelConfig

FIXTURES = Path(__file__).parents[2] / "fixtures/tokenizers"
SEED = 101
TINY = {
    "llamagen_vq_tiny": VQModelConfig(
        model_type="llamagen_vq", codebook_size=64, token_size=8, z_channels=16, channel_mult=[1, 2], num_res_blocks=1
    ),
    "taming_vqgan_tiny": VQModelConfig(
        model_type="taming_vqgan", codebook_size=64, token_size=8, z_channels=16, channel_mult=[1, 2], num_res_blocks=1
    ),
    "vqgan_plus_tiny": VQModelConfig(
        model_type="vqplus", codebook_size=64, token_size=16, channel_mult=[1, 1, 2], num_res_blocks=1
    ),
    "maskbit_lfq_tiny": VQModelConfig(
        model_type="vqplus", quantizer_type="lookup-free", codebook_size=1024, token_size=10, channel_mult=[1, 2]
    ),
}
FULL = {
    "llamagen_vq16": VQModelConfig(model_type="llamagen_vq", codebook_size=16_384, token_size=8),
    "taming_vqgan_f16": VQModelConfig(model_type="taming_vqgan", codebook_size=16_384),
    "vqgan_plus_12bit": VQModelConfig(model_type="vqplus", codebook_size=4096, token_size=64),
    "maskbit_12bit": VQModelConfig(
        model_type="vqplus", quantizer_type="lookup-free", codebook_size=4096, token_size=12
    ),
}
NOT_WEIGHTS = {  # of the published files
    "llamagen_vq16": {"quantize.codebook_used": (65_536,)},
    "maskbit_12bit": {"quantize.bits_to_indices": (12,), "quantize.codebook": (4096, 12)},
}
IN_MINUS_1_TO_1 = ("llamagen", "taming")  # pixels of the published code


class Published:
    """A tokenizer with formula weights, and what the published code gave for it."""

    def __init__(self, name: str, sizes: VQModelConfig, half: bool) -> None:
        self.tokenizer = build_tokenizer(sizes)
        assert isinstance(self.tokenizer, ConvTokenizer)
        state = {key: formula_weight(key, tuple(x.shape), SEED) for key, x in self.tokenizer.state_dict().items()}
        self.tokenizer.load_state_dict({key: x.half() if half else x for key, x in state.items()})
        self.tokenizer.eval().requires_grad_(False)
        self.shift = 1 if name.startswith(IN_MINUS_1_TO_1) else 0
        with np.load(FIXTURES / f"{name}.npz") as arrays:
            self.expected = {key: torch.from_numpy(arrays[key]) for key in arrays.files}

    def in_their_range(self, images: Tensor) -> Tensor:
        return images * 2 - 1 if self.shift else images

    def in_our_range(self, images: Tensor) -> Tensor:
        return (images + 1) / 2 if self.shift else images


def formula_images(expected: dict[str, Tensor]) -> Tensor:
    """One image in [0, 1]; see the fixtures' `image_head`."""
    random = np.random.RandomState(int(expected["seed"]))
    low = random.rand(1, 3, 4, 4).repeat(64, axis=2).repeat(64, axis=3)
    return torch.from_numpy(np.clip(0.75 * low + 0.25 * random.rand(1, 3, 256, 256), 0, 1).astype(np.float32))


@pytest.fixture
def tiny(name: str, monkeypatch: pytest.MonkeyPatch) -> Published:
    monkeypatch.setattr(conv_layers, "MIN_GROUP_WIDTH", 1)  # the fixtures have 32 groups of few channels
    return Published(name, replace(TINY[name], hidden_channels=32, resolution=32), half=True)


def check(published: Published, images: Tensor, every: int, channels: slice) -> None:
    """Encoder, codes, embeddings, decoder. Known are `channels` of the features and every `every`th row and column."""
    tokenizer, expected = published.tokenizer, published.expected
    close = {"atol": 1e-4, "rtol": 0}
    grid = tokenizer.encode_grid(images)
    torch.testing.assert_close(grid[:, channels], expected["features"], **close)
    codes = tokenizer.encode(images)
    certain = expected["margins"] > 1e-4
    assert certain.float().mean() > 0.99
    assert torch.equal(codes[certain], expected["codes"][certain])
    if "embed" in expected:
        vectors = tokenizer.codebook_lookup(expected["decode_ids"])[:, : expected["embed"].shape[1]]
        torch.testing.assert_close(vectors, expected["embed"], **close)
    for name, given in (("decoded_unclamped", expected["decode_ids"]), ("reconstruction", expected["codes"])):
        decoded = published.in_their_range(tokenizer.decode_unclamped(given))
        torch.testing.assert_close(decoded[..., ::every, ::every], expected[name], **close)


@pytest.mark.parametrize("name", TINY)
def test_tiny_tokenizers_compute_the_published_functions(tiny: Published) -> None:
    check(tiny, tiny.in_our_range(tiny.expected["images"]), every=1, channels=slice(None))


@pytest.mark.parametrize("name", ["llamagen_vq_tiny", "taming_vqgan_tiny"])
def test_terms_of_training(tiny: Published) -> None:
    assert isinstance(tiny.tokenizer, TrainableTokenizer)
    expected = tiny.expected
    reconstruction, output = tiny.tokenizer(tiny.in_our_range(expected["images"]))
    torch.testing.assert_close(tiny.in_their_range(reconstruction), expected["reconstruction"], atol=1e-4, rtol=0)
    terms = output.codebook_loss, 0.25 * output.commitment_loss, 0.1 * entropy_loss(output.distances())
    if "train_vq_loss" in expected:
        wanted = [expected[f"train_{name}_loss"] for name in ("vq", "commit", "entropy")]
        torch.testing.assert_close(torch.stack(terms), torch.stack(wanted), atol=1e-5, rtol=1e-5)
    else:
        torch.testing.assert_close(terms[0] + terms[1], expected["quantizer_loss"], atol=1e-5, rtol=1e-5)


def test_entropy_is_low_where_each_feature_has_its_own_code() -> None:
    nearest = 1 - torch.eye(16)
    assert entropy_loss(nearest).item() == pytest.approx(-np.log(16), abs=1e-3)
    assert entropy_loss(torch.ones(16, 16)).item() == pytest.approx(0, abs=1e-3)  # no feature is nearer to a code
    assert entropy_loss(nearest[:1].expand(16, 16)).item() == pytest.approx(0, abs=1e-3)  # all have the same code


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_full_size_tokenizers_compute_the_published_functions(name: str) -> None:
    published = Published(name, FULL[name], half=False)
    images = formula_images(published.expected)
    head = published.in_their_range(images)[0, :, 0, :4]
    torch.testing.assert_close(head, published.expected["image_head"], atol=1e-6, rtol=0)
    check(published, images, every=4, channels=slice(None, None, 4 if name == "taming_vqgan_f16" else 1))


@pytest.mark.parametrize("name", FULL)
def test_keys_of_published_files(name: str) -> None:
    """All of them, with their shapes; and they tell the tokenizer and its sizes."""
    lines = (FIXTURES / f"{name}_keys.txt").read_text().splitlines()
    wanted = {key: tuple(map(int, shape)) for key, *shape in map(str.split, lines)}
    with torch.device("meta"):
        tokenizer = build_tokenizer(FULL[name])
        found = {key: tuple(value.shape) for key, value in tokenizer.state_dict().items()}
        assert found | NOT_WEIGHTS.get(name, {}) == wanted
        assert config_from_state_dict({key: torch.empty(shape) for key, shape in wanted.items()}) == FULL[name]


def test_llamagen_f8_has_more_codes() -> None:
    sizes = VQModelConfig(model_type="llamagen_vq", codebook_size=16_384, token_size=8, channel_mult=[1, 2, 2, 4])
    with torch.device("meta"):
        tokenizer = build_tokenizer(sizes)
    assert tokenizer.code_shape == (32, 32)
    assert config_from_state_dict(tokenizer.state_dict()) == sizes


def small(name: str) -> VQModelConfig:
    return replace(TINY[name], hidden_channels=8, resolution=16)


@pytest.mark.parametrize(
    ("name", "nest", "more"),
    [
        ("llamagen_vq_tiny", "model", {"quantize.codebook_used": torch.zeros(65_536)}),
        ("llamagen_vq_tiny", "ema", {}),
        ("taming_vqgan_tiny", "state_dict", {"loss.discriminator.main.0.weight": torch.ones(2), "loss.logvar": 1}),
        ("vqgan_plus_tiny", None, {}),
    ],
)
def test_published_files_load(tmp_path: Path, name: str, nest: str | None, more: dict[str, Tensor]) -> None:
    tokenizer = build_tokenizer(small(name)).eval()
    state = tokenizer.state_dict() | {key: torch.as_tensor(value) for key, value in more.items()}
    torch.save({nest: state} if nest else state, tmp_path / "published.pt")
    experiment = ExperimentConfig(output_dir="unused", tokenizer_checkpoint=str(tmp_path / "published.pt"))
    sizes = replace(small(name), num_latent_tokens=tokenizer.image_seq_len)
    loaded = load_tokenizer(Config(experiment=experiment, model=ModelConfig(vq_model=sizes)))
    assert loaded.sha256() == tokenizer.sha256()
    state["another"] = torch.zeros(1)
    torch.save({nest: state} if nest else state, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"1 unexpected \(another\)"):
        tokenizer.load_weights(tmp_path / "other.pt")


def test_computed_tensors_of_published_files_are_compared(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(small("maskbit_lfq_tiny"))
    buffers = {
        "quantize.bits_to_indices": 2 ** torch.arange(10, dtype=torch.int32),
        "quantize.codebook": tokenizer.codebook_lookup(torch.arange(1024)[None])[0].half(),
    }
    path = tmp_path / "published.bin"
    torch.save(tokenizer.state_dict() | buffers, path)
    tokenizer.load_weights(path)
    for key, changed in (
        ("quantize.codebook", buffers["quantize.codebook"].flip(1)),
        ("quantize.codebook", buffers["quantize.codebook"][:512]),
        ("quantize.codebook", buffers["quantize.codebook"][None]),
        ("quantize.bits_to_indices", buffers["quantize.bits_to_indices"].flip(0)),
    ):
        torch.save(tokenizer.state_dict() | buffers | {key: changed}, path)
        with pytest.raises(InputError, match=rf"published\.bin: {key}: found other values than expected"):
            tokenizer.load_weights(path)


def test_bits_of_codes() -> None:
    """Channel 0 is the least significant bit, and exactly 0 is off."""
    quantizer = SignQuantizer(18)
    features = torch.full((1, 3, 18), -0.5)
    features[0, 1, 0], features[0, 2, 17], features[0, 0, 5] = 0.1, 0.1, 0.0
    assert quantizer.nearest(features).tolist() == [[0, 1, 2**17]]
    everything = torch.arange(2**18)[None]
    vectors = quantizer.lookup(everything)
    assert vectors.abs().eq(1).all()
    assert torch.equal(quantizer.nearest(vectors), everything)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "maskgit_vq", "quantizer_type": "lookup-free"}, "quantizer_type=lookup-free: maskgit_vq does"),
        ({"model_type": "llamagen_vq", "quantizer_type": "lookup-free"}, "lookup-free: llamagen_vq does not read it"),
        ({"model_type": "vqplus", "z_channels": 16}, "z_channels=16: vqplus does not read it; leave it out"),
        ({"model_type": "vqplus", "quantizer_type": "lookup-free", "token_size": 10}, "codebook_size=512: .*=1024"),
        ({"model_type": "taming_vqgan", "hidden_channels": 10}, "hidden_channels=10: expected a multiple of 4"),
    ],
)
def test_keys_that_do_not_fit(changes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_tokenizer(replace(VQModelConfig(codebook_size=512), **changes))
