"""Weights, tokenizers and codes are those of their provenance: stale, damaged or foreign ones are refused."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.codes.store_files import open_store, write_meta
from data.codes.token_store import TokenStore, open_tokens
from data.codes.token_writer import StoreMeta, new_token_store
from evaluation.run_log import find_step
from scripts import complete_images, sample_imagenet_rear, sweep_guidance, train_rear
from tests.faults.test_resuming import flip_a_bit
from tests.script_config import script_config
from utils.config import load_config
from utils.errors import InputError
from utils.files.weights import load_state_dict, save_weights
from utils.run import launch
from utils.run.manifest import read_manifest
from utils.run.resume import Start, untrained_classes
from utils.run.weights_path import find_weights

STEPS = ["training.max_train_steps=12", "experiment.save_every=4"]


@pytest.fixture(scope="module")
def trained(tiny_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended at step 4, was resumed and stopped at step 8: its final weights are of step 4."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(tiny_arguments, folder, "training.max_train_steps=4", "training.use_ema=true")
    final = (folder / "model.safetensors").read_bytes()
    train(tiny_arguments, folder, *STEPS, "training.use_ema=true", "training.stop_steps=8")
    (folder / "model.safetensors").write_bytes(final)
    (folder / "status.json").write_text(json.dumps({"status": "running", "step": 10, "reason": ""}))
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def train(tiny_arguments: list[str], folder: Path, *overrides: str) -> None:
    train_rear.main(load_config([*tiny_arguments, f"experiment.output_dir={folder}", *overrides]))


def sample(tiny_arguments: list[str], weights: Path, output: Path, *overrides: str) -> None:
    arguments = [f"experiment.output_dir={output}", f"experiment.generator_checkpoint={weights}", *overrides]
    sample_imagenet_rear.main(load_config([*tiny_arguments, "sampling.num_fid_samples=8", *arguments]))


def test_a_run_folder_means_its_newest_complete_state(run: Path) -> None:
    found = find_weights(str(run))
    assert found.path == run / "checkpoint-8/ema.safetensors"
    assert len(found.notices) == 1
    assert re.search(r"checkpoint-8 .*running.*model\.safetensors is of step 4", found.notices[0])
    flip_a_bit(run / "checkpoint-8/ema.safetensors")
    found = find_weights(str(run))
    assert found.path == run / "model.safetensors"  # as new as checkpoint-4
    assert "checkpoint-8/ema.safetensors: damaged" in found.notices[0]
    (run / "model.safetensors").unlink()
    assert find_weights(str(run)).path == run / "checkpoint-4/ema.safetensors"
    for step in (4, 8):
        shutil.rmtree(run / f"checkpoint-{step}")
    with pytest.raises(InputError, match="found no weights: no complete checkpoint yet"):
        find_weights(str(run))


def test_final_weights_are_taken_when_nothing_is_newer(run: Path) -> None:
    shutil.rmtree(run / "checkpoint-8")
    found = find_weights(str(run))
    assert (found.path, found.step, found.notices) == (run / "model.safetensors", 4, ())


def test_a_damaged_checkpoint_is_named(run: Path) -> None:
    checkpoint = run / "checkpoint-8"
    for path in (checkpoint, checkpoint / "model.safetensors"):
        find_weights(str(path))
    flip_a_bit(checkpoint / "model.safetensors")
    with pytest.raises(InputError, match=r"checkpoint-8/model\.safetensors: damaged, found sha256"):
        find_weights(str(checkpoint / "model.safetensors"))
    (checkpoint / "ema.safetensors").unlink()
    with pytest.raises(InputError, match=r"ema\.safetensors: found no file, expected"):
        find_weights(str(checkpoint))


@pytest.mark.parametrize("name", ["checkpoint-8.tmp", "checkpoint-8.deleted"])
def test_an_unfinished_checkpoint_is_refused(run: Path, name: str) -> None:
    (run / "checkpoint-8/manifest.json").unlink()
    (run / "checkpoint-8").rename(run / name)
    with pytest.raises(InputError, match=f"{name}: found an unfinished"):
        find_weights(str(run / name))


def test_a_flipped_bit_in_final_weights_is_named_by_every_reader(
    tiny_arguments: list[str], run: Path, tmp_path: Path
) -> None:
    final = run / "model.safetensors"
    flip_a_bit(final)
    with pytest.raises(InputError, match=r"model\.safetensors: damaged, found tensors of sha256"):
        load_state_dict(final)
    with pytest.raises(InputError, match="damaged, found tensors"):
        sample(tiny_arguments, final, tmp_path / "x")
    with pytest.raises(InputError, match="damaged, found tensors"):
        train(tiny_arguments, tmp_path / "fine_tuned", f"experiment.init_from={final}")
    with pytest.raises(InputError, match="damaged, found tensors"):
        train(tiny_arguments, tmp_path / "resumed", f"experiment.resume={final}")


def test_weights_remember_their_tokenizer(tiny_arguments: list[str], run: Path, tmp_path: Path) -> None:
    other = other_tokenizer(tiny_arguments, tmp_path)
    for weights in (run, run / "checkpoint-4", run / "model.safetensors"):
        with pytest.raises(InputError, match=r"trained with the tokenizer of sha256 .*allow_other_tokenizer=true"):
            sample(tiny_arguments, weights, tmp_path / "x", other)
    sample(tiny_arguments, run, tmp_path / "x", other, "experiment.allow_other_tokenizer=true")
    with pytest.raises(InputError, match="trained with the tokenizer of sha256"):
        train(tiny_arguments, run, *STEPS, "training.use_ema=true", other)


def other_tokenizer(tiny_arguments: list[str], folder: Path) -> str:
    """Another tokenizer of the same sizes."""
    config = load_config([*tiny_arguments, "experiment.output_dir=unused"])
    state = load_state_dict(Path(config.experiment.tokenizer_checkpoint))
    state["quantize.embedding.weight"] += 0.01
    save_weights(state, folder / "other.safetensors")
    return f"experiment.tokenizer_checkpoint={folder / 'other.safetensors'}"


@pytest.mark.parametrize("key", ["init_from", "resume"])
def test_training_from_weights_of_another_tokenizer_is_refused(
    tiny_arguments: list[str], run: Path, tmp_path: Path, key: str
) -> None:
    other = other_tokenizer(tiny_arguments, tmp_path)
    short = ["training.max_train_steps=1", "training.use_ema=true"]
    for weights in (run / "model.safetensors", run / "checkpoint-4/model.safetensors"):
        source = f"experiment.{key}={weights}"
        for wrong, message in (
            (other, r"trained with the tokenizer of sha256 .*allow_other_tokenizer=true"),
            ("model.generator.num_attention_heads=2", "trained with model.generator.num_attention_heads=4, found 2"),
        ):
            with pytest.raises(InputError, match=message):
                train(tiny_arguments, tmp_path / "new", *short, source, wrong)
        assert not (tmp_path / "new/config.yaml").exists()
    train(tiny_arguments, tmp_path / "new", *short, source, other, "experiment.allow_other_tokenizer=true")
    published = tmp_path / "published.safetensors"
    save_weights(load_state_dict(run / "model.safetensors"), published)
    train(tiny_arguments, tmp_path / "p", *short, f"experiment.{key}={published}", other)
    assert f"{published}: records no tokenizer" in (tmp_path / "p/log.txt").read_text()


def test_another_number_of_heads_is_refused(tiny_arguments: list[str], run: Path, tmp_path: Path) -> None:
    """The shapes of the weights do not show it."""
    with pytest.raises(InputError, match=r"trained with model\.generator\.num_attention_heads=4, found 2"):
        sample(tiny_arguments, run, tmp_path / "x", "model.generator.num_attention_heads=2")


@pytest.mark.parametrize(
    "other",
    ["training.seed=1", "model.generator.order=random", "model.generator.transition_alignment_weight=2", "optimizer"],
)
def test_a_finished_run_is_not_started_again_with_other_values(
    tiny_arguments: list[str], run: Path, tmp_path: Path, other: str
) -> None:
    key = "optimizer.params.learning_rate" if other == "optimizer" else other.partition("=")[0]
    changed = ["optimizer.params.learning_rate=1e-2", "lr_scheduler.params.learning_rate=1e-2"]
    changed = changed if other == "optimizer" else [other]
    finished = [*STEPS, "training.use_ema=true", "training.stop_steps=8"]
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(InputError, match=rf"checkpoint-8: the run has no steps left, found .*{key}=.*output_dir"):
        train(tiny_arguments, run, *finished, *changed)
    assert (run / "config.yaml").read_bytes() == before
    with pytest.raises(InputError, match="the run has no steps left"):
        train(tiny_arguments, tmp_path / "fork", *finished, *changed, f"experiment.resume={run / 'checkpoint-8'}")
    assert not (tmp_path / "fork/config.yaml").exists()


def test_a_finished_run_started_again_stays_what_it_was(
    tiny_arguments: list[str], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with newer code, other sampling and moved data: the weights are those of the run."""
    finished = [*STEPS, "training.use_ema=true", "training.stop_steps=8"]
    train(tiny_arguments, run, *finished)
    before = (run / "model.safetensors").read_bytes()
    codes = Path(str(load_config([*tiny_arguments, "experiment.output_dir=x"]).dataset.params.pretokenization))
    shutil.copy(codes, tmp_path / "moved.jsonl")
    monkeypatch.setattr(launch, "code_facts", lambda: {"code": "another"})
    more = [f"dataset.params.pretokenization={tmp_path / 'moved.jsonl'}", "model.generator.guidance_scale=2"]
    train(tiny_arguments, run, *finished, *more, "experiment.log_every=7")
    assert (run / "model.safetensors").read_bytes() == before
    train(tiny_arguments, run, *STEPS, "training.use_ema=true", "training.seed=1")  # steps left: logged, as before
    assert "training.seed=1, was 42" in (run / "log.txt").read_text()


def test_samples_are_recorded_with_the_values_of_the_training(
    tiny_arguments: list[str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = ["model.generator.order=random", "model.generator.perturb_ratio_max=0.5"]
    sample(tiny_arguments, run / "model.safetensors", tmp_path / "x", *changed, "model.generator.top_k=3")
    assert "trained with model.generator.perturb_ratio_max=1.0, not 0.5, order=raster" in capsys.readouterr().out
    provenance = json.loads((tmp_path / "x.json").read_text())["provenance"]
    assert provenance["model.generator.order"] == "raster"
    assert provenance["model.generator.perturb_ratio_max"] == 1.0
    assert provenance["model.generator.top_k"] == 3
    assert load_config([f"config={tmp_path / 'x.yaml'}"]).model.generator.order == "raster"


def named_store(tiny_arguments: list[str], folder: Path, names: list[str]) -> tuple[Path, list[str]]:
    """A copy of the tiny project's codes in a store with these class names, and a folder of images of these classes."""
    jsonl = Path(str(load_config([*tiny_arguments, "experiment.output_dir=x"]).dataset.params.pretokenization))
    shutil.copy(jsonl, folder / "codes.jsonl")
    store = open_tokens(folder / "codes.jsonl", 24, 16, 5)
    write_meta(store.path, replace(store.meta, class_names=names))
    for name in names:
        (folder / "images" / name).mkdir(parents=True, exist_ok=True)
    paths = [f"dataset.params.pretokenization={store.path}"]
    return store.path, [*paths, f"dataset.params.train_shards_path_or_url={folder / 'images'}"]


def test_names_are_those_of_the_classes_that_were_trained(tiny_arguments: list[str], tmp_path: Path) -> None:
    """A class added to the images later, or other names in the store, shift no class."""
    names = ["birch", "cedar", "fir", "oak", "pine"]
    store, data = named_store(tiny_arguments, tmp_path, names)
    short = ["training.max_train_steps=2", *data]
    train(tiny_arguments, tmp_path / "run", *short)
    assert find_weights(str(tmp_path / "run")).class_names == names
    sample(tiny_arguments, tmp_path / "run", tmp_path / "by_id", "sampling.class_labels=[1]")
    (tmp_path / "images/alder").mkdir()
    cedar = ["sampling.class_labels=[cedar]", *data]
    for weights in (tmp_path / "run", tmp_path / "run/checkpoint-2", tmp_path / "run/model.safetensors"):
        sample(tiny_arguments, weights, tmp_path / f"by_name_{weights.name}", *cedar)
        found = np.load(tmp_path / f"by_name_{weights.name}.npz")
        assert set(found["arr_1"].tolist()) == {1}
        np.testing.assert_array_equal(found["arr_0"], np.load(tmp_path / "by_id.npz")["arr_0"])
    with pytest.raises(
        InputError, match=r"train_shards_path_or_url=.*images: found other class names than in .*tokens"
    ):
        train(tiny_arguments, tmp_path / "new", *short)
    plain = tmp_path / "plain.safetensors"  # records no names, so the data's are asked for
    save_weights(load_state_dict(tmp_path / "run/model.safetensors"), plain)
    with pytest.raises(InputError, match="found other class names than in"):
        sample(tiny_arguments, plain, tmp_path / "x", *cedar)
    sample(tiny_arguments, plain, tmp_path / "x", *cedar, "dataset.params.train_shards_path_or_url=null")
    assert set(np.load(tmp_path / "x.npz")["arr_1"].tolist()) == {1}
    shutil.rmtree(tmp_path / "images")
    meta = open_store(store)[0]
    write_meta(store, replace(meta, class_names=names[::-1]))
    for output, more in (
        (tmp_path / "run", ["training.max_train_steps=3"]),
        (tmp_path / "new", [f"experiment.resume={tmp_path / 'run/model.safetensors'}"]),
    ):
        with pytest.raises(InputError, match=r"trained on the classes birch, cedar, .*, found pine, oak, .*init_from"):
            train(tiny_arguments, output, *short, *more)
    train(tiny_arguments, tmp_path / "tuned", *short, f"experiment.init_from={tmp_path / 'run'}")


def test_samples_remember_the_step_of_their_weights(
    tiny_arguments: list[str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, weights, step in (("newest", run, 8), ("final", run / "model.safetensors", 4)):
        sample(tiny_arguments, weights, tmp_path / name)
        assert find_step(tmp_path / f"{name}.npz", run) == step
    record = tmp_path / "final.json"
    there = json.loads(record.read_text())
    size = (tmp_path / "final.npz").stat().st_size
    record.write_text(json.dumps({"bytes": size, "provenance": there["provenance"]}))  # no step, as in old records
    sample(tiny_arguments, run / "model.safetensors", tmp_path / "final")
    assert "final.npz: already made" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"final\.json: found no 'step'"):
        find_step(tmp_path / "final.npz", run)


def test_resume_takes_the_newest_checkpoint_of_a_run_folder(
    tiny_arguments: list[str], run: Path, tmp_path: Path
) -> None:
    command = [*STEPS, "training.use_ema=true", f"experiment.resume={run}"]
    train(tiny_arguments, tmp_path / "fork", *command, "training.stop_steps=10")
    assert "using checkpoint-8" in (tmp_path / "fork/log.txt").read_text()
    assert "steps 8 to 10" in (tmp_path / "fork/log.txt").read_text()
    train(tiny_arguments, tmp_path / "fork", *command)
    assert "steps 10 to 12" in (tmp_path / "fork/log.txt").read_text()


def test_a_schedule_that_does_not_end_is_warned_of(tiny_arguments: list[str], tmp_path: Path) -> None:
    train(tiny_arguments, tmp_path / "run", "training.max_train_steps=3")
    log = (tmp_path / "run/log.txt").read_text()
    assert "warning: schedule: lr_scheduler.params.warmup_steps=5 is beyond training.max_train_steps=3" in log
    assert "model.generator.randomness_anneal_end=30 is beyond training.max_train_steps=3" in log


@pytest.fixture
def codes(tiny_config_file: Path, tmp_path: Path) -> Path:
    shutil.copy(tiny_config_file.parent / "codes.jsonl", tmp_path / "codes.jsonl")
    return tmp_path / "codes.jsonl"


def test_the_content_of_a_jsonl_decides_not_its_time(codes: Path, tmp_path: Path) -> None:
    store = open_tokens(codes, 24, 16, 5).path
    meta = json.loads((store / "meta.json").read_text())
    facts = {**meta, "tokenizer_sha256": "0" * 64, "class_names": list("abcde"), "crops_per_image": 2}
    (store / "meta.json").write_text(json.dumps(facts))
    os.utime(codes, (1, 1))
    made = (store / "tokens.npy").stat().st_ino
    opened = open_tokens(codes, 24, 16, 5)
    assert (store / "tokens.npy").stat().st_ino == made
    assert (opened.meta.tokenizer_sha256, opened.meta.crops_per_image) == ("0" * 64, 2)
    shutil.copytree(tmp_path, tmp_path.with_name("elsewhere"))
    assert open_tokens(tmp_path.with_name("elsewhere") / "codes.jsonl", 24, 16, 5).meta.class_names == list("abcde")
    codes.write_text(codes.read_text().replace('"class_id": 0', '"class_id": 4', 1))  # other content, same size
    with pytest.raises(InputError, match=r"codes\.tokens: found other codes than in .* now"):
        open_tokens(codes, 24, 16, 5)


def test_a_store_of_ones_own_is_never_replaced(codes: Path) -> None:
    store = codes.with_suffix(".tokens")
    with new_token_store(store, StoreMeta(image_seq_len=16, codebook_size=24)) as writer:
        writer.append(np.ones((3, 16), np.int64), np.zeros(3, np.int64))
    with pytest.raises(InputError, match=r"found other codes than in .* now; train on the store"):
        open_tokens(codes, 24, 16, 5)
    assert len(TokenStore(store)) == 3


def test_a_record_does_not_change_the_tensors(run: Path) -> None:
    final, plain = load_state_dict(run / "model.safetensors"), load_file(run / "model.safetensors")
    assert all(torch.equal(final[key], plain[key]) for key in plain)


def test_classes_without_training_samples_are_named(
    tiny_arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seven = [*tiny_arguments, "model.generator.condition_num_classes=7"]
    run, output = tmp_path / "run", tmp_path / "x"
    train(seven, run, "training.max_train_steps=2", "lr_scheduler.params.warmup_steps=0")
    assert "warning: classes: 2 of 7 classes have no training samples: 5, 6" in (run / "log.txt").read_text()
    assert read_manifest(run / "checkpoint-2").provenance.untrained_classes == [5, 6]
    assert "no training samples" not in capsys.readouterr().out
    for weights in (run, run / "model.safetensors", run / "checkpoint-2"):
        with pytest.raises(InputError, match=r"no training samples of classes 6, expected classes that the weights"):
            sample(seven, weights, output, "sampling.class_labels=[1,6]")
    assert [path.name for path in tmp_path.glob("x*")] == []
    sample(seven, run, output, "sampling.class_labels=[4,1]")
    assert "no training samples" not in capsys.readouterr().out
    sample(seven, run, tmp_path / "all")
    assert f"{run / 'model.safetensors'}: found no training samples of classes 5, 6" in capsys.readouterr().out
    np.savez(tmp_path / "reference.npz", arr_0=np.zeros((8, 16, 16, 3), np.uint8))
    for script, keys in (
        (sweep_guidance, [f"sweep.reference={tmp_path / 'reference.npz'}", "sampling.class_labels=[0,5]"]),
        (complete_images, ["completion.class_label=5", "completion.keep=top:0.5"]),
    ):
        given = [*seven, f"experiment.output_dir={tmp_path / 'y'}", f"experiment.generator_checkpoint={run}", *keys]
        with pytest.raises(InputError, match=r"no training samples of classes 5, expected"):
            script.main(script_config(script, given))


@pytest.mark.parametrize(
    ("before", "expected"), [([5], [5]), ([], []), ([2, 5, 6], [5, 6]), (None, None), ("scratch", [5, 6])]
)
def test_classes_that_were_trained_before_stay_trained(tmp_path: Path, before: Any, expected: list[int] | None) -> None:
    """Of a run that starts from weights which record `before`, on data without samples of classes 5 and 6."""
    record = {"untrained_classes": None if before == "scratch" else before}
    save_weights({"x": torch.zeros(1)}, tmp_path / "x.safetensors", record)
    weights = find_weights(str(tmp_path / "x.safetensors"))
    start = Start() if before == "scratch" else Start(str(weights.path), weights)
    assert untrained_classes(start, without_samples=[5, 6]) == expected
