"""The whole evaluator with Inception, and at its full size; minutes on a CPU."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation import evaluator
from evaluation.inputs import POOL_DIM, SPATIAL_DIM
from tests.evaluation.made_up import StubExtractor, blocky_images
from tests.processes import STANDALONE
from utils.distributed import DistributedContext
from utils.files.npz import write_npz

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("npz")
    random = np.random.RandomState(0)
    images = {"reference": blocky_images(random, 30, 64), "samples": blocky_images(random, 38, 64)}
    images["samples"][::2, :, :16] = 255
    for name, array in {**images, "shuffled": images["samples"][random.permutation(38)]}.items():
        np.savez(folder / f"{name}.npz", arr_0=array)
    return {path.stem: path for path in folder.glob("*.npz")}


def evaluation(script: str, *arguments: str | Path, processes: int = 1) -> None:
    launcher = ["-m", *STANDALONE, f"--nproc_per_node={processes}"]
    command = [sys.executable, *launcher, str(ROOT / "evaluation" / script), *map(str, arguments)]
    result = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def adm(
    reference: Path, samples: Path, weights: Path, processes: int = 1, batch_size: int = 16, distance: str = "tf-fp16"
) -> dict[str, float]:
    options = ["--inception", weights, "--batch-size", batch_size, "--distance", distance]
    evaluation("evaluator.py", reference, samples, *options, processes=processes)
    name = "inception" if distance == "tf-fp16" else f"inception-{distance}"
    report = json.loads(samples.with_name(f"{samples.stem}.{name}.json").read_text())
    assert report["provenance"]["distance"] == distance
    return report["metrics"]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_inception_numbers_depend_on_the_images_only(
    files: dict[str, Path], inception_weights: Path, tmp_path: Path
) -> None:
    reference, samples = files["reference"], files["samples"]
    metrics = adm(reference, samples, inception_weights)
    assert 0 < metrics["precision"] < metrics["recall"] < 1
    for processes in (2, 3):
        assert adm(reference, samples, inception_weights, processes) == pytest.approx(metrics, rel=1e-9)
    assert adm(reference, samples, inception_weights, batch_size=5) == pytest.approx(metrics, rel=1e-6)
    shuffled = adm(reference, files["shuffled"], inception_weights)
    assert {**shuffled, "inception_score": metrics["inception_score"]} == pytest.approx(metrics, rel=1e-9)
    stored = tmp_path / "stored.npz"
    evaluation("make_reference.py", reference, stored, "--resolution=64", "--inception", inception_weights, processes=2)
    assert adm(stored, samples, inception_weights) == pytest.approx(metrics, rel=1e-6)
    fp32 = adm(reference, samples, inception_weights, distance="fp32")
    assert {key: fp32[key] for key in ("inception_score", "fid", "sfid")} == pytest.approx(
        {key: metrics[key] for key in ("inception_score", "fid", "sfid")}, rel=1e-12
    )


N_REFERENCE, N_SAMPLES, CHUNK = 10_000, 50_000, 1000


def image_chunks(n: int, seed: int) -> Iterator[np.ndarray]:
    random = np.random.RandomState(seed)
    for _ in range(0, n, CHUNK):
        yield blocky_images(random, CHUNK, 64)


def peak_memory_gb() -> float:
    """Of this process so far; resource.getrusage would count the parent's too."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e6


def full_size(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    evaluator.load_extractor = lambda *_: StubExtractor(POOL_DIM, SPATIAL_DIM, 1008)
    start = time.monotonic()
    compare = evaluator.Evaluator(folder / "reference.npz", DistributedContext(0, 1, torch.device("cpu")))
    report = compare(compare.open(folder / "samples.npz"))
    figures = {"metrics": report["metrics"], "seconds": time.monotonic() - start, "peak_gb": peak_memory_gb()}
    (folder / "figures.json").write_text(json.dumps(figures))


@pytest.mark.slow
def test_full_size_fits_in_memory(tmp_path: Path) -> None:
    """50,000 images of 64 px against 10,000, with the cheap back end at Inception's widths; prints time and memory."""
    for name, n, seed in (("reference", N_REFERENCE, 0), ("samples", N_SAMPLES, 1)):
        write_npz(tmp_path / f"{name}.npz", {"arr_0": ((n, 64, 64, 3), np.uint8, image_chunks(n, seed))})
    torch.multiprocessing.spawn(full_size, (tmp_path,))
    figures = json.loads((tmp_path / "figures.json").read_text())
    print(figures)
    assert np.isfinite(list(figures["metrics"].values())).all()
    assert figures["peak_gb"] < 3
