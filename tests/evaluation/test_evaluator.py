"""The evaluator as a whole: what it prints and writes, faults, and what its numbers do not depend on."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation import evaluator, metrics
from evaluation.collect import FeatureSums, Images
from evaluation.evaluator import Evaluator
from evaluation.inputs import POOL_DIM, STATISTICS, WEIGHTS, check_statistics, open_input
from tests.evaluation.made_up import StubExtractor, blocky_images
from tests.processes import run_ranks, run_script
from utils.distributed import DistributedContext, init_distributed
from utils.errors import InputError
from utils.files.provenance import write_record

ROOT = Path(__file__).parents[2]
SCRIPT = "evaluation/evaluator.py"
ADM_METRICS = {
    "inception_score": "Inception Score",
    "fid": "FID",
    "sfid": "sFID",
    "precision": "Precision",
    "recall": "Recall",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("npz")
    random = np.random.RandomState(0)
    images = {"reference": blocky_images(random, 90, 16), "samples": blocky_images(random, 110, 16)}
    images["samples"][:, :, :8] = images["samples"][:1, :, :8]  # another distribution, and not one class
    order = np.random.RandomState(1).permutation(110)
    for name, array in {**images, "shuffled": images["samples"][order]}.items():
        np.savez(folder / f"{name}.npz", arr_0=array)
    return {path.stem: path for path in folder.glob("*.npz")}


def stub_report(
    files: dict[str, Path], ctx: DistributedContext, samples: str = "samples", batch_size: int = 16
) -> dict[str, Any]:
    """With the cheap back end and splits of 50 images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "load_extractor", lambda *_: StubExtractor())
        patch.setattr(metrics, "SPLIT_SIZE", 50)
        compare = Evaluator(files["reference"], ctx, distance="fp32", batch_size=batch_size)
        return compare(compare.open(files[samples]))


def stub_metrics(*arguments: Any, **options: Any) -> dict[str, float]:
    """The five numbers of `stub_report`."""
    return stub_report(*arguments, **options)["metrics"]


def test_batch_size_does_not_matter(files: dict[str, Path], alone: DistributedContext) -> None:
    metrics = stub_metrics(files, alone)
    assert list(metrics) == list(ADM_METRICS)
    assert 0 < metrics["precision"] < 1
    for batch_size in (1, 7, 200):
        assert stub_metrics(files, alone, batch_size=batch_size) == pytest.approx(metrics, rel=1e-6)


def test_order_of_the_samples_matters_for_the_inception_score_only(
    files: dict[str, Path], alone: DistributedContext
) -> None:
    metrics, shuffled = stub_metrics(files, alone), stub_metrics(files, alone, "shuffled")
    score, shuffled_score = metrics.pop("inception_score"), shuffled.pop("inception_score")
    assert abs(score - shuffled_score) > 1e-3
    assert shuffled == pytest.approx(metrics, rel=1e-9)


def test_classes_of_a_split_are_counted_by_their_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "SPLIT_SIZE", 50)
    assert metrics.classes_per_split(np.arange(100) % 10) == pytest.approx(10)
    assert metrics.classes_per_split(np.sort(np.arange(100) % 10)) == pytest.approx(5)
    assert metrics.classes_per_split(np.array(["x"] * 50 + ["y"] * 25 + ["z"] * 25)) == pytest.approx(2**0.5)


LABELS = np.arange(110) % 10
ORDERS = {
    "interleaved": (LABELS, False),
    "random": (np.random.RandomState(2).permutation(LABELS), False),
    "sorted": (np.sort(LABELS), True),
    "one half after the other": (np.concatenate([LABELS[:55] % 5, 5 + LABELS[55:] % 5]), True),
    "one class": (LABELS * 0, False),
    "labels of other images": (np.sort(LABELS)[1:], False),
}


@pytest.mark.parametrize("order", ORDERS)
def test_samples_that_are_sorted_by_class_are_reported(
    files: dict[str, Path], alone: DistributedContext, tmp_path: Path, order: str
) -> None:
    labels, is_sorted = ORDERS[order]
    np.savez(tmp_path / "labelled.npz", arr_0=np.load(files["samples"])["arr_0"], arr_1=labels)
    labelled = stub_report({**files, "labelled": tmp_path / "labelled.npz"}, alone, "labelled")
    found = [warning for warning in labelled["warnings"] if "sorted by class" in warning]
    assert len(found) == int(is_sorted)
    assert labelled["metrics"] == stub_metrics(files, alone)


def worker(files: dict[str, Path], output: Path) -> None:
    with init_distributed() as ctx:
        metrics = stub_metrics(files, ctx)
    (output / f"{ctx.rank}.json").write_text(json.dumps(metrics))


@pytest.mark.multiprocess
@pytest.mark.parametrize("processes", [2, 3])
def test_number_of_processes_does_not_matter(
    files: dict[str, Path], alone: DistributedContext, tmp_path: Path, processes: int
) -> None:
    run_ranks(worker, files, tmp_path, processes=processes)
    metrics = stub_metrics(files, alone)
    for rank in range(processes):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(metrics, rel=1e-9)


def test_stored_statistics_replace_computed_ones(tmp_path: Path, alone: DistributedContext) -> None:
    statistics = {key: np.random.default_rng(0).random(shape) for key, shape in STATISTICS.items()}
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8), **statistics)
    gaussians = evaluator.gaussians(open_input(tmp_path / "x.npz", verify=False), sums=None)
    np.testing.assert_array_equal(gaussians["pool"].sigma, statistics["sigma"])
    np.testing.assert_array_equal(gaussians["spatial"].mu, statistics["mu_s"])


def test_printed_lines_are_those_of_the_original(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluator, "load_extractor", lambda *_: StubExtractor())
    monkeypatch.setattr(
        sys, "argv", ["evaluator.py", str(files["reference"]), str(files["samples"]), "--distance=fp32"]
    )
    evaluator.main()
    out, err = capsys.readouterr()
    metrics = json.loads(files["samples"].with_name("samples.inception-fp32.json").read_text())["metrics"]
    wanted = [f"{title}: {metrics[key]}" for key, title in ADM_METRICS.items()]
    assert out.splitlines()[-len(wanted) :] == wanted
    assert "distances of precision and recall: fp32" in out
    assert "warning: N = 110 samples, published numbers use 50000" in err


@pytest.mark.slow
def test_the_same_pair_is_not_computed_again(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(evaluator, "load_extractor", lambda *_: StubExtractor(POOL_DIM))  # the width of tf-fp16
    pair = [str(tmp_path / f"{name}.npz") for name in ("reference", "samples")]
    for path in map(Path, pair):
        path.write_bytes(files[path.stem].read_bytes())

    def evaluate(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["evaluator.py", *pair, *options])
        evaluator.main()
        return capsys.readouterr().out

    printed = evaluate(), evaluate("--distance=fp32")
    assert {path.name for path in tmp_path.glob("*.json")} == {"samples.inception.json", "samples.inception-fp32.json"}
    with monkeypatch.context() as patch:
        patch.setattr(StubExtractor, "__call__", None)  # not callable
        assert (evaluate(), evaluate("--distance=fp32")) == printed
        with Path(pair[1]).open("ab") as file:
            file.write(b"another")
        with pytest.raises(TypeError):
            evaluate()


def test_several_samples_share_the_features_of_the_reference(
    files: dict[str, Path], alone: DistributedContext, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = {name: Path(shutil.copy(path, tmp_path)) for name, path in files.items()}  # without reports next to them
    collected = []

    def collect(images: Images, *arguments: object, **options: object) -> FeatureSums:
        collected.append(images.path.stem)
        return original(images, *arguments, **options)

    original = evaluator.collect
    monkeypatch.setattr(evaluator, "collect", collect)
    monkeypatch.setattr(evaluator, "load_extractor", lambda *_: StubExtractor())
    compare = Evaluator(files["reference"], alone, distance="fp32")
    reports = [compare(compare.open(files[name])) for name in ("samples", "shuffled")]
    assert sorted(collected) == ["reference", "samples", "shuffled"]
    others = [Evaluator(files["reference"], alone, distance="fp32") for _ in range(2)]
    one_by_one = [other(other.open(files[name])) for other, name in zip(others, ("samples", "shuffled"), strict=True)]
    assert reports == one_by_one


def test_statistics_of_other_weights_are_refused(tmp_path: Path) -> None:
    reference = tmp_path / "x.npz"
    statistics = {key: np.zeros(shape) for key, shape in STATISTICS.items()}
    np.savez(reference, arr_0=np.zeros((4, 8, 8, 3), np.uint8), **statistics)
    opened = open_input(reference, verify=False)
    for content in (None, "[]", "{}", '{"provenance": 1}'):  # the weights are unknown
        if content is not None:
            reference.with_suffix(".json").write_text(content)
        check_statistics(opened, "a" * 64)
    write_record(reference, {WEIGHTS: "a" * 64})
    check_statistics(opened, "a" * 64)
    with pytest.raises(InputError, match=r"x.npz: found statistics .* sha256 aaaaaaaaaaaa\.\.\., expected bbbb"):
        check_statistics(opened, "b" * 64)


def test_packaged_back_end_needs_no_weights(tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    paths = [tmp_path / "reference.npz", tmp_path / "samples.npz"]
    for path, n in zip(paths, (16, 12), strict=True):
        np.savez(path, arr_0=blocky_images(random, n, 16))
    result = run_script([SCRIPT, *map(str, paths), "--backend=efficientnet_lite0", "--batch-size=4"], tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "samples.efficientnet_lite0.json").read_text())
    distance = report["metrics"]["frechet_distance"]
    assert distance > 1
    assert result.stdout.splitlines()[-1] == f"Frechet distance (EfficientNet-Lite0): {distance}"
    assert "FID" not in result.stdout
    assert "reference: N = 16 of 16x16" in result.stdout
    assert "samples: N = 12 of 16x16" in result.stdout
    assert "warning: N differs, 16 and 12" in result.stderr
    provenance = report["provenance"]
    assert len(provenance["samples"]["sha256"]) == len(provenance["weights"]["sha256"]) == 64
    assert {"python", "torch", "numpy", "efficientnet-lite-pytorch"} < provenance["versions"].keys()


def test_faults_are_one_line_and_no_number(files: dict[str, Path], tmp_path: Path) -> None:
    cut = tmp_path / "cut.npz"
    cut.write_bytes(files["samples"].read_bytes()[:5000])
    lite = ("--backend", "efficientnet_lite0")
    for arguments, problem in (
        ((files["reference"], cut, *lite), f"error: {cut}: damaged or not an npz file"),
        ((files["reference"], files["samples"], *lite, "--inception", "x.pth"), "error: --inception x.pth: not used"),
        ((files["reference"], files["samples"], *lite, "--distance", "fp32"), "error: --distance fp32: not used"),
    ):
        result = run_script([SCRIPT, *map(str, arguments)], tmp_path)
        assert result.returncode == 1
        assert result.stdout == ""
        assert result.stderr.splitlines()[-1].startswith(problem)
        assert "Traceback" not in result.stderr


@pytest.mark.multiprocess
def test_faults_are_reported_once_by_several_processes(files: dict[str, Path], tmp_path: Path) -> None:
    pair = [str(files["reference"]), str(files["samples"])]
    result = run_script([SCRIPT, *pair, "--inception=missing.pth"], tmp_path, processes=2)
    assert result.returncode != 0
    assert result.stderr.count("error: missing.pth: no such weights file") == 1


def test_batch_size_must_be_positive(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluator.py", "a.npz", "b.npz", "--batch-size=0"])
    with pytest.raises(SystemExit):
        evaluator.main()
    assert "expected a whole number from 1" in capsys.readouterr().err
