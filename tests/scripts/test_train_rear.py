"""The trainer as a whole, on a tiny project: resume, elasticity, inputs that are wrong."""

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.codes.token_writer import StoreMeta, new_token_store
from scripts import train_rear
from tests.processes import ROOT, run_script
from utils.config import Config, load_config
from utils.errors import InputError
from utils.run.metrics_file import read_metrics

LOSSES = ["train/loss", "train/ar_loss", "train/proj_loss", "train/correct_tokens", "train/grad_norm", "train/lr"]
NO_DROPOUT = ["model.generator.dropout=0", "model.generator.attn_drop=0"]


def config_of(arguments: list[str], output_dir: Path, *overrides: str) -> Config:
    return load_config([*arguments, f"experiment.output_dir={output_dir}", *overrides])


def run(arguments: list[str], output_dir: Path, *overrides: str) -> list[dict]:
    train_rear.main(config_of(arguments, output_dir, *overrides))
    return read_metrics(output_dir / "metrics.jsonl")


def launch(arguments: list[str], output_dir: Path, *overrides: str, processes: int) -> subprocess.CompletedProcess:
    """With the launch script, as a user would."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the environment's torchrun
    config_file = arguments[0].removeprefix("config=")
    variables = {"CONFIG": config_file, "NUM_GPUS": str(processes), "OUTPUT_DIR": str(output_dir)}
    return subprocess.run(
        ["bash", str(ROOT / "scripts_bash/rear_train.sh"), *arguments[1:], *overrides],
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def seen_ids(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Dataset rows of every micro-batch that the trainer consumes."""
    seen: list[list[int]] = []
    original = train_rear.training_step

    def recording(model, tokenizer, batch, **rest):
        seen.append(batch["index"].tolist())
        return original(model, tokenizer, batch, **rest)

    monkeypatch.setattr(train_rear, "training_step", recording)
    return seen


def test_training_learns_and_writes_its_run_folder(tiny_arguments: list[str], tmp_path: Path) -> None:
    rows = run(tiny_arguments, tmp_path / "run", "training.max_train_steps=30", "experiment.generate_every=15")
    assert rows[-1]["train/ar_loss"] < rows[0]["train/ar_loss"]
    assert rows[-1]["train/proj_loss"] < rows[0]["train/proj_loss"] - 0.02
    assert rows[0]["train/loss"] == pytest.approx(rows[0]["train/ar_loss"] + rows[0]["train/proj_loss"], abs=1e-4)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"config.yaml", "environment.txt", "log.txt", "metrics.jsonl", "training_curves.png"}
    assert names >= {"checkpoint-30", "model.safetensors"}
    assert len(list((tmp_path / "run/train_generated_images").iterdir())) == 2
    assert load_config([f"config={tmp_path / 'run/config.yaml'}"]).training.max_train_steps == 30


def test_a_step_is_trained_at_the_ratios_of_its_number(
    tiny_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[float, float]] = []
    original = train_rear.training_step

    def recording(*arguments, max_ratio, order_ratio, **rest):
        used.append((max_ratio, order_ratio))
        return original(*arguments, max_ratio=max_ratio, order_ratio=order_ratio, **rest)

    monkeypatch.setattr(train_rear, "training_step", recording)
    steps = {"randomness_anneal_end": 4, "order_anneal_start": 1, "order_anneal_end": 3}
    schedule = ["model.generator.order=annealed", *(f"model.generator.{name}={step}" for name, step in steps.items())]
    rows = run(tiny_arguments, tmp_path / "run", *schedule, "training.max_train_steps=4")
    assert used == [(1, 1), (0.75, 1), (0.5, 0.5), (0.25, 0)]
    assert [(row["train/perturbation_ratio"], row["train/random_order_ratio"]) for row in rows] == used


def test_plain_ar_has_the_cross_entropy_as_its_loss(tiny_arguments: list[str], tmp_path: Path) -> None:
    off = ["model.generator.perturb_mode=none", "model.generator.transition_alignment=false"]
    rows = run(tiny_arguments, tmp_path / "run", *off, "training.max_train_steps=2")
    assert all(row["train/loss"] == row["train/ar_loss"] for row in rows)
    assert all(row["train/perturbation_ratio"] == 0 for row in rows)


def test_a_resumed_run_with_an_ema_equals_an_uninterrupted_one(
    tiny_arguments: list[str], tmp_path: Path, seen_ids: list
) -> None:
    """Bit for bit: losses, weights and sample ids, with dropout on and in the middle of a pass."""
    arguments = [*tiny_arguments, "training.use_ema=true"]
    whole = run(arguments, tmp_path / "whole")
    ids_of_whole, seen_ids[:] = list(seen_ids), []
    run(arguments, tmp_path / "resumed", "training.stop_steps=17")
    resumed = run(arguments, tmp_path / "resumed")
    assert len(whole) == len(resumed) == 40
    assert seen_ids == ids_of_whole
    assert [[row[name] for name in LOSSES] for row in whole] == [[row[name] for name in LOSSES] for row in resumed]
    for name in ("model.safetensors", "checkpoint-40/model.safetensors"):
        ours, theirs = load_file(tmp_path / "whole" / name), load_file(tmp_path / "resumed" / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    raw = load_file(tmp_path / "whole/checkpoint-40/model.safetensors")
    final = load_file(tmp_path / "whole/model.safetensors")
    assert not torch.equal(raw["lm_head.weight"], final["lm_head.weight"])


def test_the_ema_of_a_short_run_has_forgotten_its_initialization(tiny_arguments: list[str], tmp_path: Path) -> None:
    steps = ["training.use_ema=true", "lr_scheduler.params.warmup_steps=0"]
    run(tiny_arguments, tmp_path / "none", *steps, "training.max_train_steps=0")
    run(tiny_arguments, tmp_path / "run", *steps)
    files = ("none/model.safetensors", "run/checkpoint-40/model.safetensors", "run/model.safetensors")
    initial, final, ema = (load_file(tmp_path / name)["lm_head.weight"] for name in files)
    assert (ema - final).norm() < (initial - final).norm() / 3
    assert "EMA: its decay rises to training.ema_decay=0.9999 until step 899" in (tmp_path / "run/log.txt").read_text()


def test_accumulation_changes_no_loss(tiny_arguments: list[str], tmp_path: Path, seen_ids: list) -> None:
    steps = [*NO_DROPOUT, "training.max_train_steps=4"]
    one = run(tiny_arguments, tmp_path / "one", *steps)
    ids_of_one, seen_ids[:] = list(chain(*seen_ids)), []
    halves = ["training.per_gpu_batch_size=4", "training.gradient_accumulation_steps=2"]
    two = run(tiny_arguments, tmp_path / "two", *steps, *halves)
    assert list(chain(*seen_ids)) == ids_of_one
    for a, b in zip(one, two, strict=True):
        assert [a[name] for name in LOSSES] == pytest.approx([b[name] for name in LOSSES], rel=1e-6, abs=1e-5)


@pytest.mark.multiprocess
def test_two_processes_train_as_one_does(tiny_arguments: list[str], tmp_path: Path) -> None:
    steps = [*NO_DROPOUT, "training.max_train_steps=6", "training.stop_steps=5", "training.mixed_precision=no"]
    one = run(tiny_arguments, tmp_path / "one", *steps)
    result = launch(tiny_arguments, tmp_path / "two", *steps, "training.per_gpu_batch_size=4", processes=2)
    assert result.returncode == 0, result.stderr
    two = read_metrics(tmp_path / "two/metrics.jsonl")
    for a, b in zip(one, two, strict=True):
        assert a["train/lr"] == b["train/lr"]
        assert [a[name] for name in LOSSES] == pytest.approx([b[name] for name in LOSSES], rel=1e-6, abs=1e-5)
    resumed = run(tiny_arguments, tmp_path / "two", *NO_DROPOUT, "training.max_train_steps=6")
    assert [row["step"] for row in resumed] == [1, 2, 3, 4, 5, 6]


def test_on_the_fly_tokenization_gives_the_codes_of_the_images(tiny_arguments: list[str], tmp_path: Path) -> None:
    from PIL import Image

    rng = torch.Generator().manual_seed(0)
    for i in range(12):
        path = tmp_path / f"images/class_{i % 3}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(0, 256, (16, 16, 3), generator=rng).byte().numpy()).save(path)
    overrides = [
        "dataset.params.pretokenization=null",
        f"dataset.params.train_shards_path_or_url={tmp_path / 'images'}",
    ]
    steps = ["training.max_train_steps=6", "training.per_gpu_batch_size=6"]
    whole = run(tiny_arguments, tmp_path / "whole", *overrides, *steps)
    run(tiny_arguments, tmp_path / "parts", *overrides, *steps, "training.stop_steps=3")
    parts = run(tiny_arguments, tmp_path / "parts", *overrides, *steps)
    assert [row["train/loss"] for row in whole] == [row["train/loss"] for row in parts]


def test_fine_tuning_starts_from_trained_weights_and_resumes(tiny_arguments: list[str], tmp_path: Path) -> None:
    run(tiny_arguments, tmp_path / "first", "training.max_train_steps=3")
    trained = load_file(tmp_path / "first/model.safetensors")
    more = [f"experiment.init_from={tmp_path / 'first'}", "model.generator.condition_num_classes=7"]
    run(tiny_arguments, tmp_path / "none", *more, "training.max_train_steps=0", "training.use_ema=true")
    start = load_file(tmp_path / "none/model.safetensors")  # the EMA
    assert torch.equal(start["embeddings.weight"][:25], trained["embeddings.weight"][:25])
    assert torch.equal(start["lm_head.weight"], trained["lm_head.weight"])
    assert "with new rows for the classes" in (tmp_path / "none/log.txt").read_text()
    steps = ["training.max_train_steps=4", "training.use_ema=true"]
    whole = run(tiny_arguments, tmp_path / "whole", *more, *steps)
    run(tiny_arguments, tmp_path / "parts", *more, *steps, "training.stop_steps=2")
    parts = run(tiny_arguments, tmp_path / "parts", *more, *steps)
    assert [row["train/loss"] for row in whole] == [row["train/loss"] for row in parts]
    assert whole[0]["train/loss"] < run(tiny_arguments, tmp_path / "scratch", *steps)[0]["train/loss"]
    with pytest.raises(InputError, match=r"init_from=x: .*experiment\.resume"):
        config_of(tiny_arguments, tmp_path / "x", "experiment.init_from=x", "experiment.resume=y")


def test_the_log_has_epochs_in_images_and_passes(tiny_arguments: list[str], tmp_path: Path) -> None:
    rows = run(tiny_arguments, tmp_path / "run", "training.max_train_steps=10", "experiment.max_train_examples=5")
    assert tuple(rows[-1][f"train/{name}"] for name in ("epoch", "dataset_passes", "skipped_images")) == (16.0, 1.6, 0)
    log = (tmp_path / "run/log.txt").read_text()
    assert "10 steps are 16 epochs of 5 images, 1.6 dataset passes" in log


def test_codes_of_another_tokenizer_are_refused(tiny_arguments: list[str], tmp_path: Path) -> None:
    with new_token_store(tmp_path / "a.tokens", StoreMeta(16, 24, tokenizer_sha256="0" * 64)) as writer:
        writer.append(np.zeros((9, 16), int), np.zeros(9, int))
    with pytest.raises(InputError, match=r"a\.tokens: made by a tokenizer of sha256 000"):
        run(tiny_arguments, tmp_path / "run", f"dataset.params.pretokenization={tmp_path / 'a.tokens'}")


GOOD = json.dumps({"class_id": 1, "tokens": [0] * 16})
BAD_LINES = {
    "a code out of range": (json.dumps({"class_id": 1, "tokens": [0] * 15 + [24]}) + "\n", "24"),
    "a label out of range": (json.dumps({"class_id": 5, "tokens": [0] * 16}) + "\n", "5"),
    "a short line": (json.dumps({"class_id": 1, "tokens": [0] * 15}) + "\n", "15"),
    "a truncated last line": (GOOD[:-9], "truncat"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_codes_are_named_and_leave_nothing_behind(tiny_arguments: list[str], tmp_path: Path, case: str) -> None:
    last_line, message = BAD_LINES[case]
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{GOOD}\n{GOOD}\n{last_line}")
    with pytest.raises(InputError) as error:
        run(tiny_arguments, tmp_path / "run", f"dataset.params.pretokenization={path}")
    assert str(path) in str(error.value)
    assert "line 3" in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("bad.jsonl", "run")] == []


def test_user_errors_are_one_line_and_a_status(tiny_arguments: list[str], tmp_path: Path) -> None:
    command = ["scripts/train_rear.py", *tiny_arguments]
    command += [f"experiment.output_dir={tmp_path / 'run'}", "experiment.tokenizer_checkpoint=absent.safetensors"]
    result = run_script(command, tmp_path)
    assert result.returncode == 1
    assert result.stderr.strip().startswith("error: ")
    assert "absent.safetensors" in result.stderr
    assert result.stderr.strip().count("\n") == 0
    assert not (tmp_path / "run").exists()
