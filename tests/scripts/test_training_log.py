"""What training reports: means of intervals, validation losses, status, weights along the way, lack of memory."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from data.codes.token_store import open_tokens
from evaluation import validator
from modeling.loading import load_generator
from scripts import train_rear
from tests.faults.runs import Run
from tests.processes import run_script
from utils.config import load_config
from utils.errors import TrainingError
from utils.run import checkpoint, reporter, training_run
from utils.run.metrics import IntervalMeans
from utils.run.metrics_file import read_metrics
from utils.run.status import read_status

MEANS = (
    "train/loss",
    "train/ar_loss",
    "train/proj_loss",
    "train/correct_tokens",
    "train/decode_cos",
    "train/grad_norm",
)

AT_STEP = ("lr", "perturbation_ratio", "random_order_ratio", "epoch", "dataset_passes")


def run(arguments: list[str], folder: Path, *overrides: str) -> list[dict]:
    assert train_rear.main(load_config([*arguments, f"experiment.output_dir={folder}", *overrides])) == "completed"
    return read_metrics(folder / "metrics.jsonl")


def test_a_line_is_the_mean_of_its_steps(tiny_arguments: list[str], tmp_path: Path) -> None:
    """With a skipped update, two micro-batches per step and an end that is no multiple of 7."""
    order = ["model.generator.order=annealed", "model.generator.order_anneal_start=4"]
    steps = ["training.max_train_steps=17", "training.gradient_accumulation_steps=2", *order]
    each = {row["step"]: row for row in run(tiny_arguments, tmp_path / "each", *steps)}
    lines = run(tiny_arguments, tmp_path / "lines", *steps, "experiment.log_every=7")
    assert [row["step"] for row in lines] == [1, 7, 14, 17]
    for row, first in zip(lines, (1, 2, 8, 15), strict=True):
        of_steps = [each[step] for step in range(first, row["step"] + 1)]
        for name in MEANS:
            assert row[name] == pytest.approx(sum(one[name] for one in of_steps) / len(of_steps), rel=1e-6), name
        assert row["train/grad_norm_max"] == max(one["train/grad_norm"] for one in of_steps)
        for name in AT_STEP:
            assert row[f"train/{name}"] == of_steps[-1][f"train/{name}"]
    assert {"perf/images_per_s", "perf/step_ms", "perf/data_wait_pct"} <= lines[1].keys()
    assert "perf/step_ms" not in lines[0]  # the first step is not like the others


def test_nothing_waits_for_the_device_between_two_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            assert function is not torch.ops.aten._local_scalar_dense.default
            return function(*arguments, **(options or {}))

    from tests.utils.run.test_metrics import ALONE, metrics_of

    interval, norm = IntervalMeans(ALONE), torch.tensor(1.0)
    with Waits():
        for step in range(3):
            interval.add(metrics_of(step), norm)
        with pytest.raises(AssertionError):
            float(norm)


def test_heldout_losses_of_codes(tiny_arguments: list[str], tiny_config_file: Path, tmp_path: Path) -> None:
    codes = tiny_config_file.parent / "codes.jsonl"
    keys = [f"dataset.params.eval_pretokenization={codes}", "experiment.eval_every=4"]
    rows = run(tiny_arguments, tmp_path, *keys, "training.max_train_steps=10", "training.use_ema=true")
    measured = {row["step"]: row for row in rows if "val/ar_loss" in row}
    assert list(measured) == [4, 8, 10]
    config = load_config([*tiny_arguments, "experiment.output_dir=unused"])
    model = load_generator(tmp_path / "model.safetensors", config.model).eval()  # the EMA
    store = open_tokens(codes, 24, 16, 5)
    codes, labels = (torch.tensor(array.astype("int64")) for array in (store.codes, store.class_ids))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(codes, labels).logits.double().flatten(0, 1), codes.flatten())
    assert measured[10]["val/ar_loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert measured[10]["val/ar_loss_noisy"] != measured[10]["val/ar_loss"]
    assert "step 10: held-out ar_loss" in (tmp_path / "log.txt").read_text()
    assert Image.open(tmp_path / "heldout_loss_by_position.png").width > 300


def test_held_out_data_without_steps_or_steps_without_data_change_nothing(
    tiny_arguments: list[str], tmp_path: Path
) -> None:
    rows = run(tiny_arguments, tmp_path / "a", "experiment.eval_every=1", "training.max_train_steps=2")
    rows += run(tiny_arguments, tmp_path / "b", "dataset.params.eval_pretokenization=absent", "training.stop_steps=2")
    assert not any(name.startswith("val/") for row in rows for name in row)


def test_missing_held_out_images_end_the_start(tiny_arguments: list[str], tmp_path: Path) -> None:
    missing = ["experiment.eval_every=5", "dataset.params.eval_shards_path_or_url=absent-*.tar"]
    done = run_script(
        ["scripts/train_rear.py", *tiny_arguments, *missing, f"experiment.output_dir={tmp_path}/run"], tmp_path
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "validation images (experiment.eval_every=0: no validation): " in done.stderr
    assert "absent-*.tar" in done.stderr
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_weights_along_the_way(tiny_arguments: list[str], tmp_path: Path) -> None:
    run(tiny_arguments, tmp_path, "experiment.save_weights_every=4", "training.max_train_steps=8")
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == [
        "0000004.safetensors",
        "0000008.safetensors",
    ]
    assert (tmp_path / "weights/0000008.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_status_tells_where_a_run_stands(tiny_arguments: list[str], tmp_path: Path) -> None:
    """At a line of the log, at the end, and with the seconds of the start before."""
    seen = []
    original = reporter.Reporter.log

    def log(self: reporter.Reporter, *arguments: object, **options: object) -> None:
        original(self, *arguments, **options)
        seen.append(read_status(tmp_path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporter.Reporter, "log", log)
        run(tiny_arguments, tmp_path, "experiment.save_every=3", "training.stop_steps=5")
    assert [(status.status, status.step) for status in seen] == [("running", step) for step in range(1, 6)]
    assert seen[1].eta_s is not None
    assert seen[-1].eta_s == 0
    first = read_status(tmp_path)
    assert first.last_checkpoint == str(tmp_path / "checkpoint-5")
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", first.time)
    run(tiny_arguments, tmp_path, "training.stop_steps=7")
    assert read_status(tmp_path).trained_s > first.trained_s > 0
    manifest = json.loads((tmp_path / "checkpoint-7/manifest.json").read_text())
    assert manifest["state"]["trained_s"] > first.trained_s - 0.1


def test_the_log_of_a_batch_system_has_lines_and_no_bar(tiny_arguments: list[str], tmp_path: Path) -> None:
    command = ["scripts/train_rear.py", *tiny_arguments, f"experiment.output_dir={tmp_path}/run"]
    done = run_script([*command, "experiment.log_every=2", "training.max_train_steps=4"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stderr
    steps = re.findall(r"step (\d+): loss \d\.\d+, ar_loss .*, lr \S+", done.stderr)
    assert steps == ["1", "2", "4"]
    assert "memory of each process in GiB, estimated: weights" in done.stderr


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()]
)
def test_want_of_memory_names_the_keys(
    tiny_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def training_step(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(train_rear, "training_step", training_step)
    with pytest.raises(
        TrainingError, match=r"step 0: out of memory .*training\.per_gpu_batch_size.*use_checkpoint=true"
    ):
        run(tiny_arguments, tmp_path)
    assert "out of memory" in read_status(tmp_path).reason


def test_a_warning_reaches_the_log_and_the_status(tiny_arguments: list[str], tmp_path: Path) -> None:
    training = Run([*tiny_arguments, "training.max_train_steps=12"], tmp_path / "run")
    training.completed(TEST_POISON="3@0")
    expected = "first skipped update: a loss or gradient was not finite"
    assert f"warning: {expected}" in training.log()
    assert training.status().warning == f"step 3: {expected}"
    assert [row["train/nonfinite_steps"] for row in read_metrics(training.folder / "metrics.jsonl")] == [0] * 3 + [
        1
    ] * 9


def test_what_led_to_the_end_of_a_run_is_in_its_log(tiny_arguments: list[str], tmp_path: Path) -> None:
    training = Run([*tiny_arguments, "experiment.log_every=10", "training.max_nonfinite_steps=3"], tmp_path / "run")
    assert training(TEST_POISON="13+@0") == [1]
    rows = read_metrics(training.folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 10, 15]
    assert rows[-1]["train/loss"] > 0  # of the steps up to 13
    assert rows[-1]["train/nonfinite_steps"] == 3
    assert training.status().warning.startswith("step 13: first skipped update")


@pytest.mark.parametrize("failing", ["save_training_curves", "damaged metrics", "save_sample_grid"])
def test_a_picture_that_cannot_be_drawn_costs_no_training(
    tiny_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*arguments: object) -> None:
        raise (
            OSError(28, "No space left on device", "picture.png") if failing == "save_sample_grid" else ValueError("x")
        )

    if failing == "damaged metrics":
        (tmp_path / "metrics.jsonl").write_text("{}\n[]\n")
    else:
        monkeypatch.setattr(train_rear if failing == "save_sample_grid" else reporter, failing, fail)
    steps = ["training.max_train_steps=4", "experiment.generate_every=2"]
    assert train_rear.main(load_config([*tiny_arguments, f"experiment.output_dir={tmp_path}", *steps])) == "completed"
    assert (tmp_path / "model.safetensors").is_file()
    assert (tmp_path / "log.txt").read_text().count("training continues without") == 2


def test_pauses_are_no_steps(
    tiny_arguments: list[str], tiny_config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saves, grids, held-out numbers, weights and curves that take a while appear in `perf/pause_s`."""
    slow = {
        (train_rear, "save_sample_grid"): "experiment.generate_every=2",
        (checkpoint, "take_snapshot"): "experiment.save_every=3",
        (training_run, "save_weights"): "experiment.save_weights_every=4",
        (validator, "validation_losses"): "experiment.eval_every=5",
    }
    for module, name in slow:
        original = getattr(module, name)

        def slowly(*arguments: object, original: Callable = original) -> object:
            time.sleep(0.5)
            return original(*arguments)

        monkeypatch.setattr(module, name, slowly)
    codes = f"dataset.params.eval_pretokenization={tiny_config_file.parent / 'codes.jsonl'}"
    rows = run(tiny_arguments, tmp_path, *slow.values(), codes, "training.max_train_steps=7")
    paused = [row["step"] for row in rows if row["perf/pause_s"] >= 0.5]
    assert paused == [3, 4, 5, 6, 7]  # after 2: grid; 3: save; 4: weights and grid; 5: held-out; 6: grid and save
