"""The quick start itself, in a tiny setting: killed when it has made the codes, then given again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.run.metrics_file import read_metrics

ROOT = Path(__file__).parents[2]
STEPS, SAMPLES = 4, 4  # the evaluator wants four images
WAIT_S = 600  # for a machine that is busy with other things


@contextmanager
def quickstart(out: Path) -> Iterator[subprocess.Popen]:
    """The quick start on one thread, in a process group of its own, which is killed on leaving."""
    environment = {
        **os.environ,
        "VIRTUAL_ENV": sys.prefix,  # the environment of these tests, activated or not
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OUT": str(out),
        "NUM_SAMPLES": str(SAMPLES),
        "OMP_NUM_THREADS": "1",
    }
    overrides = [
        f"dataset.params.train_shards_path_or_url={out}/images/train-000002.tar",  # a quarter of the tiles
        "dataset.preprocessing.pretokenize_crops=center",
        f"training.max_train_steps={STEPS}",
        "training.global_batch_size=4",
        "training.per_gpu_batch_size=2",
        "lr_scheduler.params.warmup_steps=1",
        "model.generator.randomness_anneal_end=3",
        "experiment.log_every=1",
    ]
    command = ["bash", "scripts_bash/quickstart.sh", *overrides]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.slow
def test_a_killed_quick_start_resumes_and_writes_its_report(tmp_path: Path) -> None:
    out = tmp_path / "quickstart"
    codes = out / "train.tokens"
    give_up = time.monotonic() + WAIT_S
    with quickstart(out) as process:
        while not codes.exists() and process.poll() is None and time.monotonic() < give_up:
            time.sleep(0.01)
    written = codes.stat().st_mtime_ns
    assert process.returncode == -signal.SIGKILL

    with quickstart(out) as process:
        printed, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, printed

    assert codes.stat().st_mtime_ns == written  # not made again
    rows = read_metrics(out / "rear/metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, STEPS + 1))
    values = dict(line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| "))
    report = (out / "report.html").read_text()
    assert all(f"<td>{name}</td><td>{value}</td>" in report for name, value in values.items() if name[0] not in "q-")
    assert report.count("data:image/png;base64,") == 3
    frechet = f"Frechet distance (EfficientNet-Lite0) to {SAMPLES} held-out tiles"
    distances = [
        float(values[f"{frechet}: {what}"])
        for what in (
            f"{SAMPLES} samples",
            f"{SAMPLES} samples of an untrained model",
            "the tokenizer's reconstructions",
            f"{SAMPLES} training tiles",
        )
    ]
    assert min(distances) > 0
    assert float(values["trained / untrained"]) == pytest.approx(distances[0] / distances[1], abs=0.01)
    assert float(values["tokenizer, held-out tiles: PSNR"].removesuffix(" dB")) > 20
    assert float(values["training step 1: loss"]) > 0
    assert float(values[f"training step {STEPS}: loss"]) > 0

    picture = np.asarray(Image.open(out / "samples_by_region.png").convert("RGB"))
    assert picture.shape[1] >= 12 * 64  # a column for each region
    assert np.unique(picture).size > 50
