"""Stored features train as the encoder itself does, and are computed once."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from modeling.loading import load_tokenizer
from modeling.targets.registry import Targets
from scripts import compute_features, pretokenize
from tests.conftest import make_noise_images
from utils.config import load_config
from utils.errors import InputError
from utils.files.weights import save_weights
from utils.schema import TapConfig


def test_stored_features_are_the_encoders(
    tiny_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    save_weights(timm.create_model("test_vit", pretrained=False).state_dict(), tmp_path / "vit.safetensors")
    encoder, output = f"timm:test_vit:{tmp_path / 'vit.safetensors'}", tmp_path / "features.npy"
    data = [
        *tiny_arguments,
        f"dataset.params.train_shards_path_or_url={make_noise_images(tmp_path / 'images', 5, 16, 16)}",
        f"dataset.params.pretokenization={tmp_path / 'train.tokens'}",
        "dataset.preprocessing.pretokenize_crops=center_flip",
    ]
    config = load_config([*data, "experiment.output_dir=unused"])
    pretokenize.main(config)
    compute_features.main(encoder, output, data)
    config.model.generator.taps = [
        TapConfig("stored", target="stored", source=str(output), z_dim=64),
        TapConfig("own", target="encoder", source=encoder, z_dim=64),
    ]
    tokenizer = load_tokenizer(config)
    targets = Targets(config, tokenizer, num_samples=20)
    dataset = compute_features.open_training_data(config, tokenizer.sha256(), verify=False, need_images=["own"])
    batch = compute_features.on_device(dataset.__getitems__([19, 3, 3]), torch.device("cpu"))
    found = targets(targets.taps, batch["codes"], batch)
    torch.testing.assert_close(found["stored"].float(), found["own"], atol=2e-3, rtol=1e-3)
    assert json.loads(output.with_suffix(".json").read_text())["shape"] == [20, 16, 64]
    before = output.stat().st_mtime_ns
    compute_features.main(encoder, output, data)
    assert capsys.readouterr().out.endswith(f"{output}: already computed\n")
    assert output.stat().st_mtime_ns == before
    with pytest.raises(InputError, match="exists with another provenance: encoder: found test_vit"):
        compute_features.main("efficientnet_lite0", output, data)
    for overrides, name, message in (
        (["dataset.params.pretokenization=null"], "x.npy", "pretokenization: missing"),
        ([], "x.bin", r"x\.bin: expected a name that ends in \.npy"),
    ):
        with pytest.raises(InputError, match=message):
            compute_features.main(encoder, tmp_path / name, [*data, *overrides])
    assert np.load(output).dtype == np.float16
