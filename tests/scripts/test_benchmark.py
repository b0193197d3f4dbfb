"""The benchmarks run, agree with their baselines and end with one line of JSON; measured values are not asserted."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data.codes.conversion import jsonl_to_store
from data.codes.jsonl import Sizes, format_lines
from modeling.rear import ReAR
from modeling.sampling.generate import generate
from scripts import benchmark
from scripts.benchmarks import data, measure, sampling, training
from scripts.benchmarks.baselines import BASELINES
from scripts.benchmarks.rounding_ties import FLOAT32_GAP, largest_gap
from utils.config import load_config
from utils.errors import InputError
from utils.randomness import image_uniforms
from utils.schema import ModelConfig


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "CPU_MATMUL", 32)
    monkeypatch.setattr(measure, "CPU_COPY_BYTES", 2**12)


def last_line(capsys: pytest.CaptureFixture) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_sampling(capsys: pytest.CaptureFixture) -> None:
    small = ["--width", "32", "--layers", "1", "--tokens", "4", "16", "--batch", "1", "3", "--repeats", "2"]
    benchmark.main(["sampling", *small, "--end-to-end", "5"])
    figures = last_line(capsys)
    measured = {"images_per_s", "latency_s", "peak_memory_mb", "cold_start_s", "end_to_end_images_per_s"}
    measured |= {f"ratio_{name}" for name in (*BASELINES, "random_orders")}
    assert all(figures[name] > 0 for name in measured)
    assert (figures["tokens"], figures["batch"]) == (16, 3)
    assert [(row["tokens"], row["batch"]) for row in figures["settings"]] == [(4, 1), (4, 3), (16, 1), (16, 3)]


def test_sampling_refuses_a_baseline_with_other_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "BASELINES", {"wrong": lambda model, labels, uniforms, config: uniforms.long()})
    small = ["--width", "32", "--layers", "1", "--tokens", "4", "--batch", "1", "--repeats", "1"]
    with pytest.raises(InputError, match="wrong: 16 of 16 codes differ"):
        benchmark.main(["sampling", *small])


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_compute_the_model(name: str, tiny_model: ReAR) -> None:
    """Greedy sampling, so that the logits alone decide, gives the argmax of the teacher-forced logits."""
    labels, uniforms = torch.tensor([0, 3]), torch.zeros(2, 16)
    config = load_config(["experiment.output_dir=x", "model.generator.randomize_temperature=1e-5"]).model.generator
    config.guidance_scale = 1.0
    codes = BASELINES[name](tiny_model, labels, uniforms, config)
    with torch.no_grad():
        assert torch.equal(tiny_model(codes, labels).logits.argmax(dim=-1), codes)


def test_training(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ["--width", "32", "--layers", "1", "--heads", "2", "--tokens", "4", "--batch", "6", "--eager-baseline"]
    benchmark.main(["training", *small, "--classes", "2", "--repeats", "2", "--checkpointing"])
    figures = last_line(capsys)
    keys = ("ratio_published", "samples_per_s", "samples_per_s_published", "mfu", "peak_bytes", "peak_bytes_published")
    assert all(figures[key] > 0 for key in keys)
    assert figures["flops_ratio"] > 1.1
    assert (figures["tokens"], figures["batch"], figures["checkpointing"]) == (4, 6, True)
    for limit, differs in (("MAX_LOSS_DIFFERENCE", "^loss: "), ("MAX_GRADIENT_DIFFERENCE", "^gradient of ")):
        with monkeypatch.context() as patch:
            patch.setattr(training, limit, -1.0)
            with pytest.raises(InputError, match=differs):
                benchmark.main(["training", *small, "--repeats", "1"])


@pytest.mark.slow
@pytest.mark.multiprocess
def test_data(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ["--tokens", "16", "--batch", "4", "--batches", "3", "--ranks", "2", "--folder", str(tmp_path)]
    benchmark.main(["data", "--lines", "50", "120", *small])
    figures = last_line(capsys)
    keys = {"start_s", "private_rss_mb", "items_per_s"}
    assert keys | {f"{key}_published" for key in keys} | {"convert_lines_per_s", "convert_extra_rss_mb"} <= set(figures)
    assert [row["lines"] for row in figures["settings"]] == [50, 120]
    assert figures["lines_published"] == 120
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr(data, "free_memory", lambda: 0)
    benchmark.main(["data", "--lines", "50", *small])
    assert "start_s_published" not in last_line(capsys)


def test_data_refuses_a_store_of_other_items(tmp_path: Path) -> None:
    sizes = Sizes(24, 16, 5)
    for name, seed in (("a", 0), ("b", 1)):
        codes = np.random.default_rng(seed).integers(0, 24, (9, 16))
        (tmp_path / f"{name}.jsonl").write_bytes(format_lines(np.zeros(9, int), codes))
        jsonl_to_store(tmp_path / f"{name}.jsonl", tmp_path / f"{name}.tokens", sizes, processes=1)
    data.compare_items(tmp_path / "a.jsonl", tmp_path / "a.tokens", 9)
    with pytest.raises(InputError, match="item 0 differs from its line"):
        data.compare_items(tmp_path / "a.jsonl", tmp_path / "b.tokens", 9)


def test_help_names_the_commands(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--help"])
    assert "{sampling,training,data,tokenizer,kernels,predict}" in capsys.readouterr().out


def test_rounding_ties(tiny_model: ReAR, tiny_config: ModelConfig) -> None:
    """Another code is explained where the uniform is at an edge of the distribution, and nowhere else."""
    labels, uniforms = torch.tensor([0, 3, 2]), image_uniforms(0, [0, 1, 2], 16)
    codes = generate(tiny_model, labels, uniforms, tiny_config.generator)

    def gap(others: torch.Tensor, at: torch.Tensor = uniforms) -> float:
        return largest_gap(tiny_model, labels, at, codes, others, tiny_config.generator)

    assert gap(codes) == 0
    other = codes.clone()
    other[1, 5] = (codes[1, 5] + 12) % 24
    other[1, 9] = 0  # after the first difference, so it does not count
    assert gap(other) > FLOAT32_GAP
    assert gap(torch.full_like(codes, 24)) == float("inf")
    low, high = 0.0, 1.0  # the edge above code (1, 0), by bisection
    for _ in range(40):
        middle = (low + high) / 2
        moved = uniforms.clone()
        moved[1, 0] = middle
        chosen = generate(tiny_model, labels, moved, tiny_config.generator)[1, 0]
        low, high = (middle, high) if chosen <= codes[1, 0] else (low, middle)
    moved[1, 0], other = low, codes.clone()
    other[1, 0] += 1
    assert gap(other, moved) < 1e-5


@pytest.mark.parametrize("arguments", ["sampling --batch -1", "training --steps 0", "data --lines x"])
def test_numbers_below_one_are_refused(arguments: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(arguments.split())
    assert "expected a whole number from 1" in capsys.readouterr().err
