"""One command from a folder to a report: its arguments, the page, and (slow) the whole way, killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import own_images_report, pretokenize

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
    found = {"metrics": {"frechet_distance": 12.34}}
    monkeypatch.setattr(own_images_report, "find_report", lambda samples, reference, backend: found)
    own_images_report.main(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<p>PSNR &lt; 20 dB</p>" in page
    assert "of 6 samples: 12.3;" in page
    assert page.count("<img ") == 2  # the others are missing
    assert Image.open(tmp_path / "samples_by_class.png").width == 2 * 10 - 2
    assert "report.html" in capsys.readouterr().out


def test_pre_tokenization_repeats_the_verdict(tmp_path: Path) -> None:
    assert pretokenize.verdict_on(str(tmp_path / "tokenizer.safetensors")) == []
    (tmp_path / "metrics.json").write_text('{"verdict": ["a", "b"]}')
    assert pretokenize.verdict_on(str(tmp_path / "tokenizer.safetensors")) == ["a", "b"]
    (tmp_path / "metrics.json").write_text("[1]")
    assert pretokenize.verdict_on(str(tmp_path / "tokenizer.safetensors")) == []


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[(4, 4)], [(30, 17), (64, 64), (16, 90)]], ids=["4 pixels", "mixed sizes"])
def test_few_images_of_one_class_killed_on_the_way(tmp_path: Path, sizes: list[tuple[int, int]]) -> None:
    rng = np.random.default_rng(0)
    folder, out = tmp_path / "pictures/one", tmp_path / "out"
    folder.mkdir(parents=True)
    for i in range(20):
        width, height = sizes[i % len(sizes)]
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{i}.png")
    command = (str(folder.parent), "--minutes", "1")
    process = own_images(*command, out=out)
    give_up = time.monotonic() + WAIT_S
    while not list(out.glob("tokenizer/checkpoint-*")) and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    config = (out / "tokenizer.yaml").read_bytes()

    process = own_images(*command, out=out)
    printed, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, printed
    assert (out / "tokenizer.yaml").read_bytes() == config
    assert "steps 0 to" not in printed.split("== 4/7")[0]  # tokenizer training was resumed
    assert (out / "report.html").is_file()
    assert len(np.load(out / "samples.npz")["arr_0"]) >= 1
