"""The difference of two files of samples: against the metric itself, its coverage, and the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation import comparison, evaluator
from evaluation.comparison import _Projected, compare
from evaluation.evaluator import Evaluator
from evaluation.metrics import Gaussian, frechet_distance
from tests.evaluation.made_up import StubExtractor, blocky_images
from tests.processes import run_ranks, run_script
from utils.distributed import DistributedContext, init_distributed
from utils.errors import InputError

MIXING = np.random.default_rng(7).normal(size=(6, 6)) / 6**0.5 + np.eye(6)
REFERENCE = Gaussian(mu=np.zeros(6), sigma=MIXING @ MIXING.T)


def samples(rng: np.random.Generator, count: int, scale: float, shift: float) -> torch.Tensor:
    return torch.from_numpy(scale * rng.normal(size=(count, 6)) @ MIXING.T + shift)


@pytest.mark.parametrize("count", [5, 100])
def test_resampled_distances_are_those_of_the_metric(count: int) -> None:
    """Also with fewer samples than features, and a reference whose covariance is singular."""
    rng = np.random.default_rng(0)
    features = samples(rng, count, scale=1.1, shift=0.3)
    rows = torch.from_numpy(rng.integers(count, size=count))
    few = rng.normal(size=(4, 6))
    for reference in (REFERENCE, Gaussian(mu=few.mean(0), sigma=np.cov(few, rowvar=False))):
        chosen = features[rows].numpy()
        expected = frechet_distance(reference, Gaussian(mu=chosen.mean(0), sigma=np.cov(chosen, rowvar=False)))
        assert _Projected(reference, features).distance(rows) == pytest.approx(expected, rel=1e-6)


def test_the_interval_covers_the_true_difference(alone: DistributedContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of infinitely many images, in at least 52 of 60 repetitions; and it is not wide for no reason."""
    monkeypatch.setattr(comparison, "RESAMPLES", 80)
    rng = np.random.default_rng(1)
    many = [samples(rng, 200_000, scale, shift).numpy() for scale, shift in ((1.1, 0.3), (0.9, -0.2))]
    of_a, of_b = (frechet_distance(REFERENCE, Gaussian(mu=x.mean(0), sigma=np.cov(x, rowvar=False))) for x in many)
    covered, widths = 0, []
    for _ in range(60):
        a, b = samples(rng, 150, 1.1, 0.3), samples(rng, 150, 0.9, -0.2)
        found = compare(REFERENCE, a, b, alone)
        covered += found.low < of_b - of_a < found.high
        widths.append(found.high - found.low)
    assert 52 <= covered < 60
    assert np.mean(widths) < 1


def test_equal_files_differ_by_nothing(alone: DistributedContext) -> None:
    features = samples(np.random.default_rng(2), 50, 1.1, 0.3)
    found = compare(REFERENCE, features, features, alone)
    assert found.a == found.b
    assert (found.difference, found.low, found.high) == (0, 0, 0)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("npz")
    random = np.random.RandomState(0)
    for name, count in (("ref", 60), ("a", 40), ("b", 40), ("few", 30)):
        np.savez(folder / f"{name}.npz", arr_0=blocky_images(random, count, 16))
    return {path.stem: path for path in folder.glob("*.npz")}


def report(files: dict[str, Path], ctx: DistributedContext) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "load_extractor", lambda *_: StubExtractor())
        patch.setattr(comparison, "RESAMPLES", 9)
        compared = Evaluator(files["ref"], ctx, backend="efficientnet_lite0", batch_size=16)
        return compared.compare(compared.open(files["a"]), compared.open(files["b"]))


def test_the_distances_are_those_of_the_evaluator(files: dict[str, Path], alone: DistributedContext) -> None:
    found = report(files, alone)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "load_extractor", lambda *_: StubExtractor())
        one_by_one = Evaluator(files["ref"], alone, backend="efficientnet_lite0", batch_size=16)
        for name in ("a", "b"):
            expected = one_by_one(one_by_one.open(files[name]))["metrics"]["frechet_distance"]
            assert found["metrics"][name] == pytest.approx(expected, rel=1e-6)
    assert found["provenance"]["a"]["file"] == "a.npz"
    assert found["provenance"]["b"]["images"] == 40
    assert found["provenance"]["reference"]["file"] == "ref.npz"


@pytest.mark.multiprocess
def test_the_number_of_processes_does_not_matter(
    files: dict[str, Path], tmp_path: Path, alone: DistributedContext
) -> None:
    run_ranks(report_on_a_rank, files, tmp_path, processes=2)
    assert json.loads((tmp_path / "report").read_text()) == pytest.approx(report(files, alone)["metrics"])


def report_on_a_rank(files: dict[str, Path], folder: Path) -> None:
    with init_distributed() as ctx:
        metrics = report(files, ctx)["metrics"]
        if ctx.is_rank0:
            (folder / "report").write_text(json.dumps(metrics))


def test_different_numbers_of_samples_are_refused(files: dict[str, Path], alone: DistributedContext) -> None:
    compared = Evaluator(files["ref"], alone, backend="efficientnet_lite0")
    with pytest.raises(InputError, match=r"few\.npz: found 30 samples, expected 40 as in .*a\.npz"):
        compared.compare(compared.open(files["a"]), compared.open(files["few"]))


def test_the_command(files: dict[str, Path], tmp_path: Path) -> None:
    """With the weights of the Python package."""
    small = {}
    for name, path in files.items():
        small[name] = tmp_path / path.name
        np.savez(small[name], arr_0=np.load(path)["arr_0"][:5])
    script = "evaluation/evaluator.py"
    names = [str(small[name]) for name in ("a", "b", "ref")]
    done = run_script([script, "--compare", *names, "--backend", "efficientnet_lite0", "--batch-size", "5"], tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("A: Frechet distance (EfficientNet-Lite0) ")
    assert lines[2].startswith("B - A: ")
    assert "says nothing about retraining" in lines[3]
    written = json.loads((tmp_path / "a.compared_with_b.efficientnet_lite0.json").read_text())
    assert written["metrics"]["difference"] == written["metrics"]["b"] - written["metrics"]["a"]
    assert written["scope"] == lines[3]
    for wrong in ([script, str(small["a"])], [script, "--compare", *names, "--log-to", "x"]):
        assert run_script(wrong, tmp_path).returncode == 2
