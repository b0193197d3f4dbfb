"""Every script with a tokenizer whose codes have no grid: nine of them per image, which could be taken for 3 x 3."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from data.codes.token_store import TokenStore
from modeling.loading import load_tokenizer
from modeling.rear import ReAR
from modeling.tokenizers.registry import build_tokenizer
from scripts import inspect_codes, make_config, make_shards, pretokenize, reconstruct, sample_imagenet_rear, train_rear
from scripts.demo_model import DemoModel, Settings
from tests.conftest import make_noise_images
from tests.script_config import script_config
from utils.config import load_config, to_yaml
from utils.errors import InputError
from utils.files.weights import save_weights
from utils.run.metrics_file import read_metrics

TITOK = {
    "model_type": "titok",
    "num_latent_tokens": 9,
    "resolution": 32,
    "is_legacy": False,
    "vit_enc_model_size": "tiny",
    "vit_dec_model_size": "tiny",
    "vit_enc_patch_size": 8,
    "vit_dec_patch_size": 8,
}


@pytest.fixture(scope="module")
def arguments(tiny_config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The tiny project with another tokenizer, and six images each of two classes."""
    folder = tmp_path_factory.mktemp("project")
    tiny = OmegaConf.create(to_yaml(load_config([f"config={tiny_config_file}"])))
    for key in ("image_seq_len", "z_dim"):
        del tiny.model.generator[key]
    del tiny.dataset.preprocessing
    tiny.model.vq_model.update(TITOK)
    OmegaConf.save(tiny, folder / "titok.yaml")
    torch.manual_seed(0)
    tokenizer = build_tokenizer(load_config([f"config={folder / 'titok.yaml'}"]).model.vq_model)
    save_weights(tokenizer.state_dict(), folder / "titok.safetensors")
    images = make_noise_images(folder / "images", 6, 32, 32)
    return [
        f"config={folder / 'titok.yaml'}",
        f"experiment.tokenizer_checkpoint={folder / 'titok.safetensors'}",
        f"dataset.params.pretokenization={folder / 'codes.tokens'}",
        *("dataset.preprocessing.pretokenize_crops=center", "dataset.preprocessing.random_flip=false"),
        *(f"dataset.params.{split}_shards_path_or_url={images}" for split in ("train", "eval")),
        *("training.max_train_steps=2", "training.per_gpu_batch_size=4", "sampling.num_fid_samples=4"),
    ]


def test_from_images_to_scores(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pretokenize.main(load_config([*arguments, "experiment.output_dir=unused"]))
    store = TokenStore(Path(arguments[2].partition("=")[2]))
    assert (store.meta.image_seq_len, store.meta.grid_size, len(store)) == (9, None, 12)
    inspect_codes.main(script_config(inspect_codes, [*arguments, f"experiment.output_dir={tmp_path / 'codes'}"]))
    assert "codes per sample: 9, without a grid" in capsys.readouterr().out
    assert (tmp_path / "codes/codes.png").is_file()
    held_out = ("experiment.eval_every=2", "experiment.eval_samples=2", "experiment.generate_every=2")
    train_rear.main(load_config([*arguments, *held_out, f"experiment.output_dir={tmp_path / 'run'}"]))
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert {"val/ar_loss", "val/frechet_lite0_2"} <= {name for row in rows for name in row}
    assert len(list((tmp_path / "run/train_generated_images").iterdir())) == 1
    assert Image.open(tmp_path / "run/heldout_loss_by_position.png").width == 560  # no map beside the curve
    on_images = ("dataset.params.pretokenization=null", f"experiment.output_dir={tmp_path / 'on_images'}")
    train_rear.main(load_config([*arguments, *on_images]))
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert [row["train/loss"] for row in read_metrics(tmp_path / "on_images/metrics.jsonl")] == losses
    weights = f"experiment.generator_checkpoint={tmp_path / 'run'}"
    sample_imagenet_rear.main(load_config([*arguments, weights, f"experiment.output_dir={tmp_path / 'samples'}"]))
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (4, 32, 32, 3)
    reconstruct.main(load_config([*arguments, f"experiment.output_dir={tmp_path / 'tokenizer'}"]))
    assert np.load(tmp_path / "tokenizer/reconstructions.npz")["arr_0"].shape == (4, 32, 32, 3)
    assert json.loads((tmp_path / "tokenizer/reconstruct.json").read_text())["psnr"] > 0


def test_the_config_of_a_tokenizer_and_images(arguments: list[str], tmp_path: Path) -> None:
    make_noise_images(tmp_path / "images", 2, 32, 32)
    make_shards.main([str(tmp_path / "images"), str(tmp_path / "shards"), "--processes", "1"])
    tokenizer = arguments[1].partition("=")[2]
    options = ["--resolution", "32", "--tokenizer", tokenizer]
    make_config.main([str(tmp_path / "shards"), str(tmp_path / "own"), *options])
    config = load_config([f"config={tmp_path / 'own/rear.yaml'}"])
    assert {key: getattr(config.model.vq_model, key) for key in TITOK} == TITOK
    assert (config.model.generator.image_seq_len, config.model.generator.z_dim) == (9, 8)
    load_tokenizer(config)
    with pytest.raises(
        InputError, match=r"--resolution 16: .*titok\.safetensors: .*encoder\.positional_embedding \(17, 32"
    ):
        make_config.main([str(tmp_path / "shards"), str(tmp_path / "other"), "--resolution", "16", *options[2:]])


def test_the_demo_shows_the_finished_image_alone(arguments: list[str], tmp_path: Path) -> None:
    config = load_config(
        [
            *arguments,
            "experiment.output_dir=unused",
            f"experiment.generator_checkpoint={tmp_path / 'model.safetensors'}",
        ]
    )
    save_weights(ReAR(config.model).state_dict(), tmp_path / "model.safetensors")
    model = DemoModel(config)
    assert not model.has_grid
    assert model.sample(0, 2, 0, Settings(1.0, 1.0, 0, 1.0)).shape == (2, 32, 32, 3)


def test_the_number_of_codes_of_a_grid_is_not_chosen(tiny_arguments: list[str]) -> None:
    config = load_config([*tiny_arguments, "experiment.output_dir=unused"])
    config.model.vq_model.num_latent_tokens = 9
    with pytest.raises(
        InputError, match=r"num_latent_tokens=9: expected 16 \(codes of shape \(4, 4\) of model_type=mask"
    ):
        load_tokenizer(config)
