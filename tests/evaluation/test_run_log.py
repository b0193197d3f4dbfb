"""Scores in the metrics of a run: at the step of the weights that were sampled, or not at all."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from evaluation import evaluator
from tests.evaluation.made_up import StubExtractor, blocky_images
from tests.processes import run_script
from utils.files.provenance import write_record

LINE = '{"step": 40, "train/loss": 5.5}\n'


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A run and samples of its checkpoint-40."""
    random = np.random.RandomState(0)
    paths = {name: tmp_path / f"{name}.npz" for name in ("reference", "samples")} | {"run": tmp_path / "run"}
    for name in ("reference", "samples"):
        np.savez(paths[name], arr_0=blocky_images(random, 40, 16))
    (paths["run"] / "checkpoint-40").mkdir(parents=True)
    (paths["run"] / "metrics.jsonl").write_text(LINE)
    record(paths)
    return paths


def record(files: dict[str, Path], **figures: object) -> None:
    weights = files["run"] / "checkpoint-40/ema.safetensors"
    facts = {"bytes": files["samples"].stat().st_size, "step": 40, "weights": str(weights)} | figures
    write_record(files["samples"], {}, figures=facts)


def evaluate(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(evaluator, "load_extractor", lambda *_: StubExtractor())
    arguments = [str(files["reference"]), str(files["samples"]), "--distance=fp32", "--log-to", str(files["run"])]
    monkeypatch.setattr(sys, "argv", ["evaluator.py", *arguments, *options])
    evaluator.main()


def lines(files: dict[str, Path]) -> list[dict]:
    return [json.loads(line) for line in (files["run"] / "metrics.jsonl").read_text().splitlines()]


def scores_in(report: Path) -> dict[str, float]:
    return {f"eval/{name}": value for name, value in json.loads(report.read_text())["metrics"].items()}


def test_scores_are_appended_once_at_the_step_of_the_weights(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = files["samples"].with_name("samples.inception-fp32.json")
    evaluate(files, monkeypatch)
    scores = scores_in(report)
    assert list(scores) == [f"eval/{name}" for name in ("inception_score", "fid", "sfid", "precision", "recall")]
    assert lines(files) == [json.loads(LINE), {"step": 40, **scores}]
    assert capsys.readouterr().err.endswith(f"appended to the metrics of {files['run']} at step 40\n")
    evaluate(files, monkeypatch)
    assert len(lines(files)) == 2
    evaluate(files, monkeypatch, "--backend=efficientnet_lite0", "--distance=tf-fp16")  # other numbers
    other = scores_in(files["samples"].with_name("samples.efficientnet_lite0.json"))
    assert list(other) == ["eval/frechet_distance"]
    assert lines(files)[2:] == [{"step": 40, **other}]


def test_a_run_that_was_moved_gets_them_too(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    files["run"] = files["run"].rename(files["run"].with_name("moved"))
    evaluate(files, monkeypatch)
    assert lines(files)[1]["step"] == 40


@pytest.mark.parametrize("problem", ["no run", "no record", "no step", "other file", "other run"])
def test_no_feature_is_computed_if_the_step_is_not_recorded(files: dict[str, Path], problem: str) -> None:
    run, samples = files["run"], files["samples"]
    record_file, size = samples.with_suffix(".json"), samples.stat().st_size
    expected = {
        "no run": f"--log-to {run}: found no metrics.jsonl, expected the folder of a training run",
        "no record": f"{record_file}: missing; --log-to needs the sampler's record, which states the step",
        "no step": f"{record_file}: found no 'step'; sample again from",
        "other file": f"{record_file}: describes another file than {samples}: {samples}: found {size} bytes",
        "other run": f"--log-to {run}: the weights of {samples} are from another run, {run.with_name('other')}",
    }[problem]
    if problem == "no run":
        (run / "metrics.jsonl").unlink()
    elif problem == "no record":
        record_file.unlink()
    elif problem == "other run":
        other = run.with_name("other")
        (other / "checkpoint-40").mkdir(parents=True)
        (other / "metrics.jsonl").write_text(LINE)
        record(files, weights=str(other / "checkpoint-40/ema.safetensors"))
    else:
        record(files, **({"step": None} if problem == "no step" else {"bytes": 7}))
    arguments = [str(files["reference"]), str(samples), "--backend=efficientnet_lite0", "--log-to", str(run)]
    done = run_script(["evaluation/evaluator.py", *arguments], run.parent)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {expected}")
    assert done.stderr.count("\n") == 1
    assert not list(run.parent.glob("samples.efficientnet*"))
    assert problem == "no run" or (run / "metrics.jsonl").read_text() == LINE
