"""Samples as a token store, and the estimates against full enumeration; resumed; refused inputs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.codes.token_store import TokenStore
from evaluation.exposure_bias import arms_of, report, summarize
from modeling.divergence import divergences
from modeling.rear import ReAR
from modeling.sampling.model_samples import ModelSamples
from scripts import exposure_bias, sample_imagenet_rear
from tests.modeling.test_divergence import SEQUENCES, log_probability_of, small_model
from utils.config import load_config, save_config
from utils.errors import InputError
from utils.files.weights import save_weights


def save_run(model: ReAR, folder: Path, data: str = "unknown") -> Path:
    """What the script needs of a run folder; `data`: hash of the training data."""
    folder.mkdir(parents=True)
    save_weights(model.state_dict(), folder / "model.safetensors", {"data": data})
    save_config(replace(load_config(["experiment.output_dir=unused"]), model=model.config), folder / "config.yaml")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A teacher and two cells of a study."""
    folder = tmp_path_factory.mktemp("runs")
    paths = [folder / "teacher", folder / "study/ar/seed1/run", folder / "study/rear/seed1/run"]
    data = ["photos", "samples of the teacher", "photos"]
    return [str(save_run(small_model(seed), path, data[seed])) for seed, path in enumerate(paths)]


def measure(arguments: list[str], output: Path, *more: str) -> dict:
    exposure_bias.main(["measure", *arguments, "--output", str(output), *more])
    return json.loads((output / "exposure_bias.json").read_text())


def test_estimates_agree_with_full_enumeration(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = measure(runs, tmp_path / "out", "--n", "2000")
    notices = [line for line in capsys.readouterr().out.splitlines() if "not on its samples" in line]
    assert [notice.partition(":")[0] for notice in notices] == [runs[2]]
    assert list(found["students"]) == ["ar/seed1", "rear/seed1"]
    p = small_model(0)
    for q, student in zip((small_model(1), small_model(2)), found["students"].values(), strict=True):
        expected = np.zeros(3)
        with torch.no_grad():
            for label in (0, 1):
                weight_p, weight_q = (log_probability_of(model, label).exp() for model in (p, q))
                values = divergences(p, q, SEQUENCES, torch.full((256,), label))
                forward, free = weight_p @ values.p_to_q.sum(1), weight_q @ values.p_to_q.sum(1)
                reverse = weight_q @ values.q_to_p.sum(1)
                expected += np.array([forward, reverse, free - forward]) / 2
        for quantity, value in zip(("forward_kl", "reverse_kl", "excess_error"), expected, strict=True):
            mean, low, high = student[quantity]
            assert low < mean < high, quantity
            assert abs(mean - value) < (high - low), quantity  # twice the half width of the 95 % interval
            assert high - low < 0.3 * abs(expected[0]), quantity
        curve = student["by_position"]
        assert sum(curve["forward_kl"]) == pytest.approx(student["forward_kl"][0])
        differences = np.subtract(curve["free_running_kl"], curve["forward_kl"]).cumsum()
        assert np.array(curve["accumulated_excess_error"])[:, 0] == pytest.approx(differences)
        assert differences[0] == pytest.approx(0, abs=1e-12)  # the first context is the class
    table = (tmp_path / "out/exposure_bias.md").read_text()
    assert "| ar/seed1 |" in table
    assert (tmp_path / "out/exposure_bias.png").stat().st_size > 10_000


def test_a_student_equal_to_the_teacher_has_no_error(runs: list[str], tmp_path: Path) -> None:
    student = measure([runs[0]] * 2, tmp_path, "--n", "50")["students"]["teacher"]
    for quantity in ("forward_kl", "reverse_kl", "excess_error"):
        assert student[quantity] == [0, 0, 0]
    assert student["excess_error_pct"] == 0


def test_students_can_be_added(runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measure(runs[:2], tmp_path, "--n", "20")
    measured = []
    original = exposure_bias.estimates_of

    def recorded(*arguments: object, title: str, **more: object) -> object:
        measured.append(title)
        return original(*arguments, title=title, **more)

    monkeypatch.setattr(exposure_bias, "estimates_of", recorded)
    both = measure(runs, tmp_path, "--n", "20")
    assert measured == ["rear/seed1"]
    assert both["students"]["ar/seed1"] == first["students"]["ar/seed1"]
    whole = measure(runs, tmp_path / "whole", "--n", "20")
    assert {name: whole["students"][name] for name in measured} == {name: both["students"][name] for name in measured}
    with pytest.raises(InputError, match=r"exists with another provenance: n: found 20, expected 21"):
        measure(runs, tmp_path, "--n", "21")


def test_the_store_holds_the_sequences_of_the_sampler(runs: list[str], tmp_path: Path) -> None:
    path = tmp_path / "train.tokens"
    exposure_bias.main(["sample", runs[0], str(path), "--n", "33", "--seed", "5"])
    store = TokenStore(path)
    assert store.class_ids.tolist() == [i % 2 for i in range(33)]
    assert json.loads((tmp_path / "train.json").read_text())["provenance"]["seed"] == 5
    overrides = ["experiment.output_dir=" + str(tmp_path / "samples"), f"experiment.generator_checkpoint={runs[0]}"]
    config = load_config([f"config={runs[0]}/config.yaml", *overrides, "model.generator.guidance_scale=1"]
                         + ["sampling.num_fid_samples=33", "sampling.seed=5"])  # fmt: skip
    save_weights({"codebook": torch.eye(4)}, tmp_path / "codebook.safetensors")
    config.experiment.tokenizer_checkpoint = str(tmp_path / "codebook.safetensors")
    sample_imagenet_rear.main(config)
    assert (TokenStore(tmp_path / "samples.tokens").codes == store.codes).all()
    assert not (tmp_path / "train.chunks").exists()


def test_a_killed_sampling_resumes(runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposure_bias, "SAMPLES_PER_CHUNK", 10)
    monkeypatch.setattr(exposure_bias, "SEQUENCES_AT_ONCE", 4)
    whole, resumed = tmp_path / "whole.tokens", tmp_path / "resumed.tokens"
    exposure_bias.main(["sample", runs[0], str(whole), "--n", "33"])
    calls = []
    original = ModelSamples.__call__

    def killed(self: ModelSamples, indices: range) -> object:
        calls.append(indices)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(self, indices)

    monkeypatch.setattr(ModelSamples, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        exposure_bias.main(["sample", runs[0], str(resumed), "--n", "33"])
    exposure_bias.main(["sample", runs[0], str(resumed), "--n", "33"])
    assert calls[5].start == 10  # the first chunk was kept
    assert TokenStore(resumed).fingerprint == TokenStore(whole).fingerprint


def test_measured_contexts_are_not_those_of_the_store() -> None:
    model = small_model(0)
    ((measured, _),) = exposure_bias.contexts_of(model, count=40, seed=1, title="")
    assert measured.shape == (40, 4)
    assert not torch.equal(measured, ModelSamples(model, seed=1)(range(40))[0])


def test_arms_are_compared_by_seed() -> None:
    rng = np.random.default_rng(0)
    students = {}
    for arm, factor in (("ar", 1.0), ("rear", 0.8)):
        for seed in range(8):
            forward = rng.uniform(0.9, 1.1, (50, 4))
            students[f"{arm}/seed{seed}"] = summarize(forward, forward + 0.1, factor * forward)
    arms = arms_of(students)
    assert [arm.name for arm in arms] == ["ar", "rear"]
    assert arms[1].curves("reverse_kl").sum(1).mean() == pytest.approx(3.2, rel=0.02)
    assert arms[0].excess_band()[0] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    table = report(students, [9.0, 8.9, 9.1])
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| rear against ar")]
    assert [row[1:3] for row in rows] == [[quantity, "8"] for quantity in ("forward_kl", "reverse_kl", "excess_error")]
    assert float(rows[1][3].split()[0]) == pytest.approx(-20, abs=1)
    assert rows[1][5] == "0.00781 |"  # the smallest of 8 seeds: all differences are negative
    assert rows[2][3] == "+0.000 nats"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "{0}", "x.npz", "--n", "3"], r"x.npz: expected a name that ends in .tokens"),
        (["measure", "{0}", "{1}", "--output", "out", "--n", "1"], r"--n 1: expected at least 2"),
        (["measure", "{0}", "{1}", "{1}", "--output", "out"], r"given twice, expected each run once"),
        (["measure", "{0}", "absent", "--output", "out"], r"absent: no such file or folder"),
        (["measure", "{0}", "{other}", "--output", "out"], r"found codebook_size=24, expected 4, that of the teacher"),
    ],
)
def test_refused_inputs(
    runs: list[str],
    tiny_model: ReAR,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if "{other}" in arguments:
        tiny_model.config.vq_model.model_type = "codes_only"
        save_run(tiny_model, tmp_path / "other")
    with pytest.raises(InputError, match=message):
        exposure_bias.main([word.format(*runs, other=tmp_path / "other") for word in arguments])
