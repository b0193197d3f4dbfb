"""The benchmarks run, agree with their baselines and end in one line of JSON; what they measure is not asserted."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data.codes.conversion import jsonl_to_store
from data.codes.jsonl import Sizes, format_lines
from modeling.rear import ReAR
from scripts import benchmark
from scripts.benchmarks import codebook, data, measure, precision, sampling, training
from scripts.benchmarks.baselines import generate_concatenating, generate_lean_concatenating, generate_no_cache
from utils.config import load_config
from utils.errors import InputError
from utils.files.weights import save_weights


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
    wanted = {"images_per_s", "ratio_no_cache", "ratio_concat_cache", "latency_s", "peak_memory_mb", "cold_start_s"}
    assert figures["ratio_random_orders"] > 0
    assert wanted <= set(figures)
    assert (figures["tokens"], figures["batch"]) == (16, 3)
    assert 20 < figures["operations_per_step"] < 100
    assert figures["attention"] == "matrix products"
    with torch.inference_mode(), sampling.CountOperations() as operations:
        torch.nn.functional.scaled_dot_product_attention(*torch.ones(3, 1, 1, 4, 8).unbind())
    assert "scaled_dot_product" in operations.attention
    assert [(row["tokens"], row["batch"]) for row in figures["settings"]] == [(4, 1), (4, 3), (16, 1), (16, 3)]
    assert figures["end_to_end_images_per_s"] > 0


def test_the_gate_of_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "BASELINES", {"wrong": lambda model, labels, uniforms, config: uniforms.long() - 1})
    with pytest.raises(InputError, match=r"gate: 16 of 16 codes differ from wrong, expected 0"):
        benchmark.main(
            ["sampling", "--width", "32", "--layers", "1", "--tokens", "4", "--batch", "1", "--repeats", "1"]
        )


@pytest.mark.parametrize("baseline", [generate_no_cache, generate_concatenating, generate_lean_concatenating])
def test_baselines_compute_the_model(baseline: Callable[..., torch.Tensor], tiny_model: ReAR) -> None:
    """One code more than a teacher-forced prefix: greedy, so that the logits alone decide."""
    labels, uniforms = torch.tensor([0, 3]), torch.zeros(2, 16)
    config = load_config(["experiment.output_dir=x", "model.generator.randomize_temperature=1e-5"]).model.generator
    config.guidance_scale = 1.0
    codes = baseline(tiny_model, labels, uniforms, config)
    with torch.no_grad():
        assert torch.equal(tiny_model(codes, labels).logits.argmax(dim=-1), codes)


def test_decode(capsys: pytest.CaptureFixture) -> None:
    benchmark.main(["decode", "--resolution", "16", "--channels", "8", "--batch", "2", "--repeats", "2"])
    figures = last_line(capsys)
    assert {"images_per_s", "ratio_plain", "peak_memory_mb"} <= set(figures)
    assert figures["grey_levels"] < 0.15


def test_training(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ["--width", "32", "--layers", "1", "--heads", "2", "--tokens", "4", "--batch", "6", "--eager-baseline"]
    benchmark.main(["training", *small, "--classes", "2", "--repeats", "2", "--checkpointing"])
    figures = last_line(capsys)
    keys = ("ratio_published", "samples_per_s", "samples_per_s_published", "mfu", "peak_bytes", "peak_bytes_published")
    assert all(figures[key] > 0 for key in keys)
    assert figures["flops_ratio"] > 1.1
    assert (figures["tokens"], figures["batch"], figures["checkpointing"]) == (4, 6, True)
    for limit, what in (("MAX_LOSS_DIFFERENCE", "loss"), ("MAX_GRADIENT_DIFFERENCE", "the gradient of")):
        with monkeypatch.context() as patch:
            patch.setattr(training, limit, -1.0)
            with pytest.raises(InputError, match=f"gate: {what}"):
                benchmark.main(["training", *small, "--repeats", "1"])


def test_codebook(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark.main(["codebook", "--sizes", "16", "4096", "--batch", "1", "--rows", "2", "--repeats", "1"])
    figures = last_line(capsys)
    assert [row["size"] for row in figures["settings"]] == [16, 4096]
    assert 0 < figures["loss_mb"] < figures["loss_copied_mb"]
    assert all(figures[f"sample{way}_ms"] > 0 for way in ("", "_top_k", "_top_p"))
    for limit, what in (("MAX_LOSS_DIFFERENCE", "loss"), ("MAX_GRADIENT_DIFFERENCE", "gradients")):
        with monkeypatch.context() as patch:
            patch.setattr(codebook, limit, -1.0)
            with pytest.raises(InputError, match=f"gate: {what}"):
                benchmark.main(["codebook", "--sizes", "16", "--batch", "1"])


def test_npz(capsys: pytest.CaptureFixture) -> None:
    benchmark.main(
        ["npz", "--images", "7", "--baseline-images", "5", "--resolution", "16", "--batch", "2", "--repeats", "2"]
    )
    assert {"images_per_s", "ratio_png", "extra_rss_mb"} <= set(last_line(capsys))


@pytest.mark.multiprocess
def test_data(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ["--tokens", "16", "--batch", "4", "--batches", "3", "--ranks", "2", "--folder", str(tmp_path)]
    benchmark.main(["data", "--lines", "50", "120", *small])
    figures = last_line(capsys)
    keys = {"start_s", "private_rss_mb", "items_per_s", "convert_lines_per_s"}
    assert keys | {f"{key}_published" for key in keys} <= set(figures)
    assert [row["lines"] for row in figures["settings"]] == [50, 120]
    assert figures["lines_published"] == 120
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr(data, "free_memory", lambda: 0)
    benchmark.main(["data", "--lines", "50", *small])
    out = capsys.readouterr().out
    assert "the published way would need more than 60% of the free memory" in out
    assert "start_s_published" not in json.loads(out.splitlines()[-1])


def test_the_gate_of_data(tmp_path: Path) -> None:
    sizes = Sizes(24, 16, 5)
    for name, seed in (("a", 0), ("b", 1)):
        codes = np.random.default_rng(seed).integers(0, 24, (9, 16))
        (tmp_path / f"{name}.jsonl").write_bytes(format_lines(np.zeros(9, int), codes))
        jsonl_to_store(tmp_path / f"{name}.jsonl", tmp_path / f"{name}.tokens", sizes, processes=1)
    data.compare_items(tmp_path / "a.jsonl", tmp_path / "a.tokens", 9)
    with pytest.raises(InputError, match="gate: item 0 differs from its line"):
        data.compare_items(tmp_path / "a.jsonl", tmp_path / "b.tokens", 9)


def test_precision(
    tiny_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On weights that are bf16 numbers and small: only activations are rounded."""
    config = load_config([*tiny_arguments, "experiment.output_dir=x"])
    torch.manual_seed(0)
    save_weights(ReAR(config.model).state_dict(), tmp_path / "model.safetensors")
    arguments = ["precision", "--images", "8", *tiny_arguments]
    with pytest.raises(InputError, match="generator_checkpoint: missing"):
        benchmark.main(arguments)
    arguments.append(f"experiment.generator_checkpoint={tmp_path / 'model.safetensors'}")
    monkeypatch.setattr(precision, "MIN_AGREEMENT", 0.5)
    benchmark.main(arguments)
    figures = last_line(capsys)
    assert figures["codes"] == 8 * 16
    monkeypatch.setattr(precision, "MAX_NLL_DIFFERENCE", -1.0)
    with pytest.raises(InputError, match="gate: "):
        benchmark.main(arguments)


def test_teacher_forced_logits_are_the_models(tiny_model: ReAR) -> None:
    codes, labels = torch.randint(24, (3, 16)), torch.tensor([0, 1, 1])
    with torch.no_grad():
        wanted = tiny_model(codes, labels).logits
    torch.testing.assert_close(
        precision.teacher_forced(tiny_model, labels, codes, torch.float32), wanted, atol=1e-4, rtol=1e-4
    )


def test_help_names_the_commands(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--help"])
    assert "{sampling,decode,training,codebook,npz,data,precision}" in capsys.readouterr().out
