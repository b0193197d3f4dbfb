"""Training with REPA's term on stored tokens and their images: from the run to samples of its export."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from scripts import pretokenize, train_rear
from tests.conftest import make_noise_images
from tests.faults.runs import Run, assert_equal_runs
from utils.config import load_config
from utils.errors import InputError
from utils.files.weights import save_weights
from utils.run.metrics_file import read_metrics

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def arguments(tiny_config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Tokens of 16 images with their mirror images, validation images, and a vision transformer with random weights."""
    folder = tmp_path_factory.mktemp("repa")
    images = make_noise_images(folder / "images", 8, 16, 16)
    torch.manual_seed(0)
    save_weights(timm.create_model("test_vit", pretrained=False).state_dict(), folder / "vit.safetensors")
    tap = {"name": "repa", "target": "encoder", "source": f"timm:test_vit:{folder / 'vit.safetensors'}", "z_dim": 64}
    data = [
        f"config={tiny_config_file}",
        f"dataset.params.train_shards_path_or_url={images}",
        f"dataset.params.eval_shards_path_or_url={images}",
        f"dataset.params.pretokenization={folder / 'train.tokens'}",
        "dataset.preprocessing.pretokenize_crops=center_flip",
    ]
    pretokenize.main(load_config([*data, "experiment.output_dir=unused"]))
    return [
        *data,
        f"model.generator.taps=[{json.dumps(tap | {'weight': 0.5})}]",
        "experiment.eval_every=20",
        "training.max_train_steps=40",
    ]


def train(arguments: list[str], folder: Path, *more: str) -> dict[int, dict[str, float]]:
    """The metrics by step."""
    train_rear.main(load_config([*arguments, f"experiment.output_dir={folder}", *more]))
    rows: dict[int, dict[str, float]] = {}
    for row in read_metrics(folder / "metrics.jsonl"):
        rows.setdefault(int(row["step"]), {}).update(row)
    return rows


def test_its_cosine_rises_and_the_export_samples_without_timm(arguments: list[str], tmp_path: Path) -> None:
    fast = [f"{section}.params.learning_rate=1e-2" for section in ("optimizer", "lr_scheduler")]
    rows = train(arguments, tmp_path / "run", *fast)
    assert rows[40]["train/repa_cos"] > rows[1]["train/repa_cos"] + 0.05
    assert rows[40]["val/repa_cos"] > rows[20]["val/repa_cos"]
    assert {f"val/{tap}_cos" for tap in ("encode", "decode", "repa")} <= rows[40].keys()
    assert (
        "alignment taps: encode (block 0, own, weight 1) to codebook vectors" in (tmp_path / "run/log.txt").read_text()
    )
    assert any(key.startswith("repa_align_mlp") for key in load_file(tmp_path / "run/model.safetensors"))
    program = f"""
import sys
for name in ("timm", "torchvision", "efficientnet_lite_pytorch"):
    sys.modules[name] = None
from pathlib import Path
import runpy
sys.argv = ["export_model.py", {str(tmp_path / "run")!r}, {str(tmp_path / "export")!r}, "--samples", "0"]
try:
    runpy.run_path({str(ROOT / "scripts/export_model.py")!r}, run_name="__main__")
except SystemExit as end:
    assert not end.code
from modeling.loading import load_pretrained
from modeling.rear import ReAR
from modeling.sampling.generate_images import generate_images
model, tokenizer = load_pretrained({str(tmp_path / "export")!r})
assert model.taps == [] == ReAR.from_pretrained({str(tmp_path / "export")!r}).taps
print(generate_images(model, tokenizer, [0, 1], seed=1).shape)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "(2, 16, 16, 3)"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_killed_run_resumes_exactly_and_two_processes_train_it_too(arguments: list[str], tmp_path: Path) -> None:
    """With an end of the term on the way, at which its cosine ends too."""
    taps = next(one for one in arguments if one.startswith("model.generator.taps="))
    ending = [*arguments, taps.replace('"weight": 0.5', '"weight": 0.5, "end_step": 9'), "training.max_train_steps=12"]
    ending += ["experiment.save_every=4", "training.per_gpu_batch_size=4"]
    oracle = Run(ending, tmp_path / "oracle").completed()
    run = Run(ending, tmp_path / "run")
    assert run(REAR_FAULT="step.6") == [-9]
    run.completed()
    assert_equal_runs(run, oracle)
    cosines = {
        row["step"]: row["train/repa_cos"]
        for row in read_metrics(run.folder / "metrics.jsonl")
        if "train/repa_cos" in row
    }
    assert np.isfinite(cosines[9])
    assert np.isnan(cosines[10])
    pair = Run([*ending, "training.per_gpu_batch_size=2"], tmp_path / "pair").completed(processes=2)
    losses = [
        [row["train/loss"] for row in read_metrics(one.folder / "metrics.jsonl") if "train/loss" in row]
        for one in (pair, oracle)
    ]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)  # later, dropout masks differ


def test_images_alone_train_it_and_tokens_alone_do_not(
    arguments: list[str], tiny_config_file: Path, tmp_path: Path
) -> None:
    short = ["training.max_train_steps=1", "experiment.eval_every=0"]
    assert "train/repa_cos" in train(arguments, tmp_path / "a", *short, "dataset.params.pretokenization=null")[1]
    for more, message in (
        ("dataset.params.train_shards_path_or_url=null", "the tap 'repa' of model.generator.taps needs the images"),
        (f"dataset.params.pretokenization={tiny_config_file.parent / 'codes.jsonl'}", "no record of the images"),
    ):
        with pytest.raises(InputError, match=message):
            train(arguments, tmp_path / "b", *short, more)


def test_validation_on_tokens_measures_the_taps_that_need_no_images(arguments: list[str], tmp_path: Path) -> None:
    (tokens,) = [one for one in arguments if one.startswith("dataset.params.pretokenization=")]
    more = ["training.max_train_steps=2", "experiment.eval_every=2", tokens.replace("params.", "params.eval_")]
    row = train(arguments, tmp_path / "run", *more)[2]
    assert {name for name in row if name.startswith("val/") and name.endswith("_cos")} == {
        "val/encode_cos",
        "val/decode_cos",
    }
