"""From a folder of images to configs that fit it, with one class and with many; then all commands at tiny sizes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modeling.tokenizers.maskgit_vq import MaskGitVQ
from modeling.tokenizers.registry import build_tokenizer, code_shape, config_from_state_dict
from scripts import (
    inspect_codes,
    make_config,
    make_shards,
    pretokenize,
    sample_imagenet_rear,
    train_rear,
    train_tokenizer,
)
from scripts.benchmarks import step_time
from tests.script_config import script_config
from utils.config import load_config
from utils.errors import InputError
from utils.files.weights import load_state_dict, save_weights
from utils.schema import VQModelConfig

SIZES = VQModelConfig(codebook_size=24, token_size=8, hidden_channels=8, channel_mult=[1, 1, 2], num_res_blocks=2)


def shards_of(tmp_path: Path, classes: int, images: int = 4, *options: str) -> Path:
    rng = np.random.default_rng(0)
    for label in range(classes):
        (tmp_path / f"images/c{label:04d}").mkdir(parents=True)
        for i in range(images):
            pixels = rng.integers(0, 256, (9, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"images/c{label:04d}/{i}.png")
    make_shards.main([str(tmp_path / "images"), str(tmp_path / "shards"), "--processes", "1", *options])
    return tmp_path / "shards"


@pytest.mark.parametrize("sizes", [SIZES, VQModelConfig(hidden_channels=32)])
def test_sizes_of_a_tokenizer_are_read_from_its_weights(sizes: VQModelConfig) -> None:
    assert config_from_state_dict(MaskGitVQ(sizes).state_dict()) == sizes
    with pytest.raises(InputError, match=r"weights without 'quantize\.embedding\.weight'"):
        config_from_state_dict({})


@pytest.mark.parametrize("classes", [1, 1100])
def test_classes_and_tokenizer_make_the_config(tmp_path: Path, classes: int) -> None:
    shards = shards_of(tmp_path, classes, 2)
    save_weights(MaskGitVQ(SIZES).state_dict(), tmp_path / "tokenizer.safetensors")
    options = ["--resolution", "12", "--tokenizer", str(tmp_path / "tokenizer.safetensors")]
    make_config.main([str(shards), str(tmp_path / "own"), *options])
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["rear.yaml"]
    config = load_config([f"config={tmp_path / 'own/rear.yaml'}"])
    generator, vq_model = config.model.generator, config.model.vq_model
    assert (generator.condition_num_classes, generator.image_seq_len, generator.z_dim) == (classes, 9, 8)
    assert (vq_model.codebook_size, vq_model.num_latent_tokens, vq_model.channel_mult) == (24, 9, [1, 1, 2])
    assert config.experiment.max_train_examples == config.sampling.num_fid_samples == 2 * classes
    assert config.dataset.params.eval_shards_path_or_url == f"{shards}/train-*.tar"  # nothing was held out
    assert config.dataset.preprocessing.random_flip
    with pytest.raises(InputError, match=r"--resolution 10: .*resolution=10: expected a multiple of 4 \(3 levels"):
        make_config.main([str(shards), str(tmp_path / "own"), "--resolution", "10", *options[2:]])


def test_tokenizers_of_another_kind(tmp_path: Path) -> None:
    """To be trained, or known from its weights."""
    shards, new = shards_of(tmp_path, 2), make_config.ROOT / "configs/tokenizer_blue_marble_llamagen.yaml"
    make_config.main([str(shards), str(tmp_path / "own"), "--resolution", "32", "--new-tokenizer", str(new)])
    configs = [load_config([f"config={tmp_path / 'own' / name}.yaml"]) for name in ("tokenizer", "rear")]
    assert configs[0].model.vq_model == configs[1].model.vq_model
    vq_model = configs[0].model.vq_model
    assert (vq_model.model_type, vq_model.z_channels, vq_model.resolution) == ("llamagen_vq", 64, 32)
    sizes = replace(SIZES, model_type="vqplus", quantizer_type="lookup-free", codebook_size=256)
    save_weights(build_tokenizer(sizes).state_dict(), tmp_path / "weights.safetensors")
    options = ["--resolution", "8", "--tokenizer", str(tmp_path / "weights.safetensors")]
    make_config.main([str(shards), str(tmp_path / "own"), *options])
    found = load_config([f"config={tmp_path / 'own/rear.yaml'}"]).model.vq_model
    assert found == replace(sizes, resolution=8, num_latent_tokens=4)


@pytest.fixture
def step_of_100_ms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of a measurement."""
    monkeypatch.setattr(train_tokenizer, "step_seconds", lambda config: 0.1)
    monkeypatch.setattr(step_time, "generator_step_seconds", lambda config: 0.1)


def test_the_budget_decides_on_the_steps(
    tmp_path: Path, step_of_100_ms: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A third of the minutes for the tokenizer and half for the generator, up to 300 passes over the images."""
    shards, own = shards_of(tmp_path, 2, 200), tmp_path / "own"
    make_config.main([str(shards), str(own), "--minutes", "3"])
    tokenizer = script_config(train_tokenizer, [f"config={own / 'tokenizer.yaml'}"])
    rear = load_config([f"config={own / 'rear.yaml'}"])
    assert (tokenizer.training.max_train_steps, rear.training.max_train_steps) == (510, 765)
    assert (tokenizer.vq_training.perceptual_start, rear.model.generator.randomness_anneal_end) == (255, 573)
    assert tokenizer.model.vq_model.resolution == 8  # that of the images
    assert "tokenizer: 510 steps of 0.100 s, about 1 minutes" in capsys.readouterr().out
    make_config.main([str(shards), str(tmp_path / "long"), "--minutes", "3000"])
    assert load_config([f"config={tmp_path / 'long/tokenizer.yaml'}"]).training.max_train_steps == 300 * 400 // 32


@pytest.mark.parametrize(
    ("resolution", "tokens", "expected"),
    [
        (32, None, 64),
        (64, None, 64),
        (128, None, 256),
        (256, None, 256),
        (28, None, 196),
        (4, None, 16),
        (32, 256, 256),
    ],
)
def test_grids(resolution: int, tokens: int | None, expected: int) -> None:
    sizes = load_config([f"config={make_config.OWN_TOKENIZER}"]).model.vq_model
    found = make_config.sizes_for(sizes, resolution, tokens=tokens, num_images=50_000)
    assert code_shape(found) == (expected**0.5, expected**0.5)
    assert found.codebook_size == 1024


@pytest.mark.parametrize(("num_images", "expected"), [(1, 16), (18, 128), (64, 512), (19_999, 512), (20_000, 1024)])
def test_codebook_follows_from_the_number_of_images(num_images: int, expected: int) -> None:
    assert make_config.codebook_for(num_images, tokens=64, usual=512) == expected


def test_impossible_grids_are_refused() -> None:
    sizes = load_config([f"config={make_config.OWN_TOKENIZER}"]).model.vq_model
    with pytest.raises(InputError, match="--tokens 100: expected one of 1, 4, 16, 64, 256, 1024 at --resolution 32"):
        make_config.sizes_for(sizes, 32, tokens=100, num_images=10)


@pytest.mark.parametrize("options", [["--tokens", "64", "--resolution", "32"], []])
def test_a_given_tokenizer_decides_on_the_tokens(tmp_path: Path, options: list[str]) -> None:
    with pytest.raises(InputError, match="expected with --resolution and without --tokens"):
        make_config.main([str(tmp_path), str(tmp_path / "own"), "--tokenizer", "weights.bin", *options])


def test_a_step_is_measured(tmp_path: Path) -> None:
    make_config.main([str(shards_of(tmp_path, 2)), str(tmp_path / "own"), "--resolution", "8", "--minutes", "1"])
    assert load_config([f"config={tmp_path / 'own/rear.yaml'}"]).training.max_train_steps >= 200


def test_from_a_folder_to_samples(tmp_path: Path, step_of_100_ms: None) -> None:
    """docs/own-images.md, with two classes and a few steps of everything."""
    shards, own = shards_of(tmp_path, 2, 6, "--heldout", "0.4"), tmp_path / "own"
    make_config.main([str(shards), str(own), "--resolution", "32", "--no-flip"])
    small = ["training.max_train_steps=2", "training.per_gpu_batch_size=4", "lr_scheduler.params.warmup_steps=1"]
    train_tokenizer.main(script_config(train_tokenizer, [f"config={own / 'tokenizer.yaml'}", *small]))
    arguments = [f"config={own / 'rear.yaml'}", *small]
    pretokenize.main(load_config(arguments))
    inspect_codes.main(script_config(inspect_codes, [*arguments, f"experiment.output_dir={own / 'codes'}"]))
    train_rear.main(load_config(arguments))
    weights = f"experiment.generator_checkpoint={own / 'rear'}"
    sample_imagenet_rear.main(load_config([*arguments, weights, f"experiment.output_dir={own / 'samples'}"]))
    arrays = np.load(own / "samples.npz")
    assert arrays["arr_0"].shape == (64, 32, 32, 3)  # more than were held out, which are too few to look at
    assert arrays["arr_1"].tolist() == [0, 1] * 32
    assert load_state_dict(own / "rear/model.safetensors")["embeddings.weight"].shape == (64 + 1 + 2 + 1, 128)


def test_no_or_ambiguous_shards(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"found shards of the kinds \[\], expected one"):
        make_config.main([str(tmp_path), str(tmp_path / "own"), "--resolution", "8"])
    for name in ("a-000000.tar", "b-000000.tar"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"kinds \['a', 'b'\]"):
        make_config.main([str(tmp_path), str(tmp_path / "own"), "--resolution", "8"])
