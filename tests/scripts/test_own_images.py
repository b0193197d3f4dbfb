"""One command from a folder to a report: its arguments, the page, and (slow) the whole way, killed and resumed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from scripts import make_config, own_images_report, pretokenize

ROOT = Path(__file__).parents[2]
WAIT_S = 900  # for a machine that is busy with other things


def own_images(*arguments: str, out: Path) -> subprocess.Popen[str]:
    """In a process group of its own, on one thread."""
    environment = {
        **os.environ,
        "VIRTUAL_ENV": sys.prefix,  # the environment of these tests, activated or not
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OUT": str(out),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        ["bash", "scripts_bash/own_images.sh", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_without_a_folder(tmp_path: Path) -> None:
    for arguments in ([], ["--minutes", "3"]):
        process = own_images(*arguments, out=tmp_path / "out")
        printed, _ = process.communicate(timeout=WAIT_S)
        assert (process.returncode, printed.count("\n")) == (2, 1)
        assert printed.startswith("usage: bash scripts_bash/own_images.sh FOLDER")


def test_other_arguments_for_the_same_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/arguments.txt").write_text(f"{tmp_path}/pictures --minutes 5\n")
    process = own_images(str(tmp_path / "pictures"), "--minutes", "6", out=tmp_path / "out")
    printed, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 2
    assert printed.splitlines()[-1].startswith(f"error: {tmp_path}/out: made with '{tmp_path}/pictures --minutes 5'")


def test_report_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("images", "tokenizer", "heldout"):
        (tmp_path / name).mkdir()
    (tmp_path / "images/classes.json").write_text(json.dumps(["cat & dog", "fish"]))
    (tmp_path / "tokenizer/metrics.json").write_text(json.dumps({"verdict": ["PSNR < 20 dB"]}))
    images = np.random.default_rng(0).integers(0, 255, (6, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "samples.npz", arr_0=images, arr_1=np.array([0, 1] * 3))
    (tmp_path / "tokenizer/worst.png").touch()
    (tmp_path / "heldout/reconstruct.json").write_text('{"images": 4}')
    found = {"metrics": {"frechet_distance": 12.34}}
    monkeypatch.setattr(own_images_report, "find_report", lambda samples, reference, backend: found)
    own_images_report.main(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<p>PSNR &lt; 20 dB</p>" in page
    assert "of 6 samples: 12.3;" in page
    assert page.count("<img ") == 2  # the others are missing
    assert Image.open(tmp_path / "samples_by_class.png").width == 2 * 10 - 2
    assert "report.html" in capsys.readouterr().out
    (tmp_path / "heldout/reconstruct.json").write_text('{"images": 3}')
    own_images_report.main(tmp_path)
    assert "<p>no scores: 3 validation images" in (tmp_path / "report.html").read_text()


def test_pre_tokenization_repeats_the_verdict(tmp_path: Path) -> None:
    assert pretokenize.verdict_on(str(tmp_path / "tokenizer.safetensors")) == []
    (tmp_path / "metrics.json").write_text('{"verdict": ["a", "b"]}')
    assert pretokenize.verdict_on(str(tmp_path / "tokenizer.safetensors")) == ["a", "b"]
    (tmp_path / "metrics.json").write_text("[1]")
    assert pretokenize.verdict_on(str(tmp_path / "tokenizer.safetensors")) == []


def pictures(folder: Path, classes: list[str], sizes: list[tuple[int, int]]) -> Path:
    """20 images of noise per class, of these widths and heights by turns."""
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(20):
            width, height = sizes[i % len(sizes)]
            Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / name / f"{i}.png")
    return folder


def run_until(pattern: str, folder: Path, out: Path) -> None:
    """Run until a file in `out` exists, then kill all processes of the run."""
    assert not list(out.glob(pattern)), pattern
    process = own_images(str(folder), "--minutes", "1", out=out)
    give_up = time.monotonic() + WAIT_S
    while not list(out.glob(pattern)) and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.05)
    subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)  # commands have groups of their own
    printed, _ = process.communicate()
    assert list(out.glob(pattern)), printed


def run_to_the_end(folder: Path, out: Path) -> str:
    process = own_images(str(folder), "--minutes", "1", out=out)
    printed, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, printed
    assert (out / "report.html").is_file()
    return printed


def shorten(out: Path) -> None:
    """A few steps for both trainings: users may edit the configs."""
    for name in ("tokenizer", "rear"):
        config = OmegaConf.load(out / f"{name}.yaml")
        assert config.training.max_train_steps == config.experiment.save_every * 4 == make_config.MIN_STEPS
        config.training.max_train_steps, config.experiment.save_every = 12, 4
        config.lr_scheduler.params.warmup_steps = 2
        OmegaConf.save(config, out / f"{name}.yaml")


@pytest.mark.slow
def test_killed_at_each_stage(tmp_path: Path) -> None:
    """With images of mixed sizes. A kill while steps are measured leaves configs without their number of steps."""
    folder, out = pictures(tmp_path / "pictures", ["a", "b"], [(30, 17), (64, 64), (16, 90)]), tmp_path / "out"
    run_until("images/shards.json", folder, out)
    run_until("rear.yaml", folder, out)
    run_until("configs.complete", folder, out)
    shorten(out)
    for pattern in ("tokenizer/checkpoint-4", "train.tokens", "rear/checkpoint-4", "samples.npz"):
        run_until(pattern, folder, out)
    weights = (out / "rear/model.safetensors").read_bytes()
    printed = run_to_the_end(folder, out)
    assert (out / "rear/model.safetensors").read_bytes() == weights
    tokenizer, tokens = printed.split("== 3/7")[1].split("== 5/7")[0].split("== 4/7")
    assert "step 12: loss" not in tokenizer
    assert "tokenizer: PSNR" in tokens  # the verdict is repeated
    assert "Frechet distance (EfficientNet-Lite0) of 64 samples: " in printed
    assert len(np.load(out / "samples.npz")["arr_0"]) == 64


@pytest.mark.slow
def test_twenty_images_of_one_class_with_4_pixels(tmp_path: Path) -> None:
    folder, out = pictures(tmp_path / "pictures", ["one"], [(4, 4)]), tmp_path / "out"
    run_until("configs.complete", folder, out)
    shorten(out)
    assert "no scores: 2 validation images" in run_to_the_end(folder, out)
    assert np.load(out / "samples.npz")["arr_0"].shape == (64, 4, 4, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "found no sub-folder, expected one per class"),
        (["a.png"], "found no sub-folder, expected one per class"),
        (["one/a.png"], "found 1 image of class 'one', expected at least 2, to hold one out"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path: Path, files: list[str], message: str) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)
    process = own_images(str(folder), out=tmp_path / "out")
    printed, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    errors = [line for line in printed.splitlines() if line and not line.startswith("==")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "out").exists()
