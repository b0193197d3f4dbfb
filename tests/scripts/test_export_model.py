"""An exported run makes the images of the sampler; what is wrong with a folder is one line."""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from data.codes.store_files import write_meta
from data.codes.token_store import open_tokens
from modeling.loading import class_names, load_pretrained, load_tokenizer
from modeling.sampling.generate_images import generate_images
from scripts import export_model, sample_imagenet_rear, train_rear
from tests.conftest import make_tiny_project
from tests.docs.pages import fences
from tests.hub_server import local_hub
from tests.processes import ROOT, Done, run_script
from utils.config import load_config
from utils.errors import InputError
from utils.files.weights import read_record, save_weights
from utils.run.metrics_file import read_metrics

SCRIPT = "scripts/export_model.py"
TRAINING = ("training.max_train_steps=3", "experiment.generate_every=9", "experiment.eval_every=3")
NAMES = ["a", "b|c", "d", "e", "f"]
LABELS = [i % 5 for i in range(37)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with projectors, EMA and validation losses, on codes whose classes have names."""
    project = make_tiny_project(tmp_path_factory.mktemp("project"))
    folder = project.parent / "rear"
    store = open_tokens(project.parent / "codes.jsonl", codebook_size=24, image_seq_len=16, num_classes=5)
    write_meta(store.path, replace(store.meta, class_names=NAMES))
    held_out = f"dataset.params.eval_pretokenization={project.parent / 'codes.jsonl'}"
    more = [held_out, f"experiment.output_dir={folder}", "training.use_ema=true", "experiment.name=tiles"]
    train_rear.main(load_config([f"config={project}", *TRAINING, *more]))
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "tiles"
    assert export(run, folder).returncode == 0
    return folder


def export(run: Path, folder: Path, *more: str) -> Done:
    return run_script([SCRIPT, str(run), str(folder), *more], folder.parent)


def test_what_is_loaded_makes_the_images_of_the_sampler(run: Path, exported: Path, tmp_path: Path) -> None:
    arguments = [f"config={run / 'config.yaml'}", f"experiment.generator_checkpoint={run}"]
    sample_imagenet_rear.main(load_config([*arguments, f"experiment.output_dir={tmp_path / 'x'}"]))
    model, tokenizer = load_pretrained(exported)
    assert not model.training
    assert not tokenizer.training
    expected = np.load(tmp_path / "x.npz")
    assert expected["arr_1"].tolist() == LABELS
    np.testing.assert_array_equal(generate_images(model, tokenizer, LABELS), expected["arr_0"])

    folder = [f"config={exported / 'config.json'}", f"experiment.generator_checkpoint={exported}"]
    folder += [f"experiment.tokenizer_checkpoint={exported / 'tokenizer/model.safetensors'}"]
    more = [f"experiment.output_dir={tmp_path / 'y'}", "sampling.num_fid_samples=37"]
    sample_imagenet_rear.main(load_config([*folder, *more]))
    np.testing.assert_array_equal(np.load(tmp_path / "y.npz")["arr_0"], expected["arr_0"])


def test_the_weights_are_the_ema_without_projectors(run: Path, exported: Path) -> None:
    ours, ema = load_file(exported / "model.safetensors"), load_file(run / "checkpoint-3/ema.safetensors")
    assert {key for key in ema if "_align_mlp." not in key} == ours.keys() < ema.keys()
    assert all(torch.equal(ours[key], ema[key]) for key in ours)


def test_the_card_says_what_is_known(run: Path, exported: Path) -> None:
    card = ModelCard.load(exported / "README.md")
    assert card.data.license is None
    assert card.data.library_name == "re-ar"
    assert "More Information Needed" not in card.text
    assert "\n# tiles\n" in card.text
    loss = read_metrics(run / "metrics.jsonl")[-1]["val/ar_loss"]
    record = json.loads((run / "checkpoint-3/manifest.json").read_text())["provenance"]
    rows = dict(re.findall(r"^\| (\S.*?) \| (.*) \|$", card.text, re.MULTILINE))
    assert rows["val/ar_loss"] == f"{loss:.5g} at step 3"
    assert rows["training"] == "3 of 3 steps"
    assert rows["weights"] == "EMA"
    assert rows["sha256 of the training data"] == record["data_hash"]
    assert rows["sha256 of the tokenizer"] == record["tokenizer_sha256"]
    with Image.open(exported / "samples.png") as picture:
        assert picture.width == 5 * 18 - 2
    assert class_names(exported) == NAMES
    assert sorted(path.name for path in exported.iterdir()) == [
        *("README.md", "classes.json", "config.json", "export.json", "model.safetensors", "samples.png", "tokenizer"),
    ]
    assert str(exported.parent) not in "".join(path.read_text() for path in exported.rglob("*.[jm][sd]*"))


def test_the_lines_of_the_card_and_of_the_page_run(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(exported.parent)
    of_page = [code for language, code in fences(ROOT / "docs/python.md") if language == "python"]
    [of_card] = [code for language, code in fences(exported / "README.md") if language == "python"]
    for code in (of_card, *of_page):
        Path("grid.png").unlink(missing_ok=True)
        exec(code.replace("outputs/tiles", "tiles"), {})
        with Image.open("grid.png") as picture:
            assert min(picture.size) >= 16


def test_an_export_is_whole_and_stays(run: Path, exported: Path, tmp_path: Path) -> None:
    again = export(run, exported)
    assert (again.returncode, again.stdout) == (0, f"{exported}: already exported from the same weights and config\n")
    other = export(run, exported, "--license", "mit")
    assert other.returncode == 1
    assert other.stderr == (
        f"error: {exported}: exists with another provenance: --license: found None, expected mit; delete it or choose "
        "another output\n"
    )
    weights = load_file(exported / "model.safetensors")
    weights["lm_head.bias"][0] = 3e38  # finite, as its logits are not
    weights["lm_head.weight"][0] = 3e38
    save_weights(weights, tmp_path / "bad.safetensors")
    for source, said in (
        (tmp_path / "bad.safetensors", "logits are not finite"),
        (tmp_path / "absent", "no such file"),
    ):
        more = [f"config={run / 'config.yaml'}"] if source.exists() else []
        done = export(source, tmp_path / "x", *more)
        assert done.returncode == 1
        assert said in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith("x")] == []


def test_what_is_missing_or_has_changed_is_not_exported_already(
    run: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = argparse.Namespace(license=None, samples=16, tokenizer="weights", push=None)
    config = export_model.load_run_config(str(run), [])
    folder = Path(shutil.copytree(exported, tmp_path / "tiles"))
    export_model.export(config, folder, options)
    for name in ("config.json", "README.md", "samples.png", "classes.json", "tokenizer/model.safetensors"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(InputError, match=rf"^{folder}: exists, but {folder / name}: found no file, expected "):
            export_model.export(config, folder, options)
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(InputError, match=rf"^{folder}: exists, but {folder / name}: found sha256 .*, expected "):
            export_model.export(config, folder, options)
        (folder / name).write_bytes(content)
    export_model.export(config, folder, options)
    monkeypatch.setattr(export_model, "run_metrics", lambda weights: {"eval/fid": "2 at step 3"})
    with pytest.raises(
        InputError, match=r"card, val/ar_loss: found \S+ at step 3, expected None|card, eval/fid: found None"
    ):
        export_model.export(config, folder, options)
    monkeypatch.undo()
    monkeypatch.setattr(export_model, "known_classes", lambda *_: (list("vwxyz"), "another store"))
    with pytest.raises(InputError, match=r"tiles: .*sha256 of the class names: found"):
        export_model.export(config, folder, options)


def test_the_card_describes_the_training_of_the_weights(run: Path, tmp_path: Path) -> None:
    """Not the config.yaml that a later start has written, not numbers of later steps, not the run around a file."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    text = (copy / "config.yaml").read_text()
    for key, was, now in (("order", "raster", "random"), ("seed", "42", "7"), ("use_ema", "true", "false")):
        assert f" {key}: {was}\n" in text
        text = text.replace(f" {key}: {was}\n", f" {key}: {now}\n")
    (copy / "config.yaml").write_text(text.replace("max_train_steps: 3\n", "max_train_steps: 99\n"))
    with (copy / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 4, "val/ar_loss": 0.5, "eval/fid": 1.0}\n')
    options = argparse.Namespace(license=None, samples=0, tokenizer="reference", push=None)
    for source in (copy, copy / "checkpoint-3", copy / "model.safetensors"):
        folder = tmp_path / f"exported-{source.name}"
        export_model.export(export_model.load_run_config(str(source), []), folder, options)
        rows = dict(re.findall(r"^\| (\S.*?) \| (.*) \|$", (folder / "README.md").read_text(), re.MULTILINE))
        assert rows["training"] == "3 of 3 steps"
        assert rows["weights"] == "EMA"
        assert "order raster" in rows["training settings"]
        assert "seed 42" in rows["training settings"]
        assert rows["val/ar_loss"].endswith(" at step 3")
        assert "eval/fid" not in rows
        assert json.loads((folder / "config.json").read_text())["model"]["generator"]["order"] == "raster"
        record = json.loads((folder / "export.json").read_text())["provenance"]
        tokenizer = json.loads((run / "checkpoint-3/manifest.json").read_text())["provenance"]["tokenizer_sha256"]
        assert record["sha256 of the tokenizer"] == tokenizer
        assert read_record(folder / "model.safetensors")["tokenizer_sha256"] == tokenizer
    shutil.copy(run / "model.safetensors", copy / "foreign.safetensors")
    with pytest.raises(InputError, match=r"foreign\.safetensors: found no config\.yaml of a run that wrote it"):
        export_model.load_run_config(str(copy / "foreign.safetensors"), [])


def test_names_of_weights_that_record_none(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As of an earlier version, also without the config of the training."""
    save_weights(load_file(run / "model.safetensors"), tmp_path / "x.safetensors", {"step": 3})
    options = argparse.Namespace(license=None, samples=0, tokenizer="reference", push=None)
    config = export_model.load_run_config(str(tmp_path / "x.safetensors"), [f"config={run / 'config.yaml'}"])
    export_model.export(config, tmp_path / "old", options)
    assert class_names(tmp_path / "old") == NAMES
    assert "class names are those of" in capsys.readouterr().out
    card = (tmp_path / "old/README.md").read_text()
    assert "| training | 3 steps |" in card
    assert "training settings" not in card


def test_a_bare_file_with_a_licence_and_a_reference(run: Path, exported: Path, tmp_path: Path) -> None:
    """The card claims nothing that a published file does not record."""
    bare = tmp_path / "bare.safetensors"
    save_weights(load_file(exported / "model.safetensors"), bare)
    options = ["--license", "cc-by-nc-4.0", "--tokenizer", "reference", "--samples", "0"]
    config = [
        f"config={run / 'config.yaml'}",
        "model.generator.guidance_scale=2",
        "dataset.params.pretokenization=null",
    ]
    folder = tmp_path / "x"
    assert "found no config.yaml" in export(bare, folder, *options).stderr
    assert export(bare, folder, *options, *config).returncode == 0
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "cc-by-nc-4.0"
    assert "| training | not recorded in the weights |" in card.text
    assert "guidance_scale 2.0" in card.text
    assert "val/" not in card.text
    assert class_names(folder) is None
    assert not (folder / "samples.png").exists()
    with pytest.raises(InputError, match=r"tokenizer: .*'tokenizer.safetensors'.*tokenizer_weights="):
        load_pretrained(folder)
    weights = load_config([config[0]]).experiment.tokenizer_checkpoint
    model, tokenizer = load_pretrained(folder, tokenizer_weights=weights)
    assert model.config.generator.guidance_scale == 2
    preset = generate_images(model, tokenizer, [1, 2])
    np.testing.assert_array_equal(preset, generate_images(*load_pretrained(exported), [1, 2], guidance_scale=2))


def test_classes_without_training_samples_are_named_and_not_drawn(tmp_path: Path) -> None:
    project = make_tiny_project(tmp_path)
    overrides = [*TRAINING, "model.generator.condition_num_classes=7", f"experiment.output_dir={tmp_path / 'rear'}"]
    train_rear.main(load_config([f"config={project}", *overrides]))
    assert export(tmp_path / "rear", tmp_path / "tiles", "--samples", "7").returncode == 0
    card = (tmp_path / "tiles/README.md").read_text()
    assert re.search(r"classes without training samples \| 5, 6", card)
    assert "class_labels=[0, 1, 2, 3, 4, 0, 1]" in card
    with pytest.warns(UserWarning, match="no training samples of classes 5, 6"):
        load_pretrained(tmp_path / "tiles")


def test_a_checkpoint_that_is_not_the_ema(run: Path, tmp_path: Path) -> None:
    assert export(run / "checkpoint-3/model.safetensors", tmp_path / "x", "--samples", "0").returncode == 0
    assert "| weights | of the last step |" in (tmp_path / "x/README.md").read_text()
    ours, model = (load_file(folder / "model.safetensors") for folder in (tmp_path / "x", run / "checkpoint-3"))
    assert all(torch.equal(ours[key], model[key]) for key in ours)


def test_codes_only(run: Path, tmp_path: Path) -> None:
    config = load_config([f"config={run / 'config.yaml'}"])
    np.save(tmp_path / "codebook.npy", load_tokenizer(config).codebook_lookup(torch.arange(24)[None])[0].numpy())
    more = ["model.vq_model.model_type=codes_only", f"experiment.tokenizer_checkpoint={tmp_path / 'codebook.npy'}"]
    assert export(run, tmp_path / "x", *more, "experiment.allow_other_tokenizer=true").returncode == 0
    assert not (tmp_path / "x/samples.png").exists()
    codes = generate_images(*load_pretrained(tmp_path / "x"), [0, 5])
    assert (codes.shape, codes.dtype) == ((2, 16), np.uint16)


BROKEN = {
    "config.json": [
        (
            lambda text: text.replace('"top_k"', '"topk"'),
            "config.json: unknown key 'model.generator.topk'; did you mean",
        ),
        (lambda text: text.replace('"top_k": 0', '"top_k": -1'), "config.json: model.generator.top_k=-1: expected"),
        (lambda text: text.replace('"top_k": 0', '"top_k": "x"'), "config.json: model.generator.top_k=x: expected"),
        (lambda text: text.replace('"hidden_size": 32', '"hidden_size": 64'), "model.safetensors: does not fit ReAR"),
        (lambda text: text[:200], "config.json, line "),
        (lambda text: "[1]", "config.json: expected a mapping of sections"),
        (lambda text: text.replace('"top_k": 0', '"top_k": "${oc.env:HOME}"'), "config.json: model.generator.top_k=$"),
        (lambda text: text[:-3] + ', "training": {"seed": 1}}', "config.json: found training.seed, expected only"),
        (None, ": found no config.json, expected a folder"),
    ],
    "model.safetensors": [
        (lambda weights: weights[:-9], "model.safetensors: "),
        (lambda weights: weights[:-9] + bytes([weights[-9] ^ 1]) + weights[-8:], "model.safetensors: damaged"),
        (lambda weights: b"", "model.safetensors: "),
        (None, "model.safetensors: "),
    ],
    "tokenizer/config.json": [
        (lambda text: text.replace("maskgit_vq", "titok"), "tokenizer/config.json: model.vq_model.vit_dec_patch")
    ],
    "tokenizer/model.safetensors": [(None, "tokenizer/model.safetensors: ")],
    "classes.json": [
        (lambda text: text[:-4], "classes.json: found no JSON"),
        (lambda text: "[" * 100_000, "classes.json: found no JSON"),
        (lambda text: '{"cat": 0}', "classes.json: found {'cat': 0}, expected a list of texts"),
    ],
}


@pytest.mark.parametrize(("name", "number"), [(name, i) for name, cases in BROKEN.items() for i in range(len(cases))])
def test_a_damaged_folder_is_one_line(exported: Path, tmp_path: Path, name: str, number: int) -> None:
    damage, message = BROKEN[name][number]
    shutil.copytree(exported, tmp_path / "x")
    path = tmp_path / "x" / name
    if damage is None:
        path.unlink()
    elif path.suffix == ".json":
        path.write_text(damage(path.read_text()))
        assert path.read_text() != (exported / name).read_text()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError) as error:
        class_names(tmp_path / "x") if name == "classes.json" else load_pretrained(tmp_path / "x")
    assert str(error.value).startswith(str(tmp_path / "x"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_another_tokenizer_is_refused(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "x")
    weights = load_file(exported / "tokenizer/model.safetensors")
    weights["quantize.embedding.weight"] += 1
    save_weights(weights, tmp_path / "x/tokenizer/model.safetensors")
    with pytest.raises(InputError, match=r"x: trained with the tokenizer of sha256 \w+\.\.\., found"):
        load_pretrained(tmp_path / "x")


def test_pushed_and_loaded_from_the_hub(run: Path, exported: Path, tmp_path: Path) -> None:
    """By huggingface_hub itself, from a process that reaches no other Hub."""
    refused = export(run, tmp_path / "refused", "--push", "no such name")
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("error: no such name: upload failed: ")
    assert (tmp_path / "refused/README.md").is_file()
    with local_hub() as hub:
        home = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_of_nobody"}
        command = [sys.executable, ROOT / SCRIPT, run, tmp_path / "tiles", "--push", "someone/tiles", "--private"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1", **home}
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert hub.private == {"someone/tiles"}
        local = {str(path.relative_to(tmp_path / "tiles")): path for path in (tmp_path / "tiles").rglob("*.*")}
        pushed = hub.files["someone/tiles"]
        assert pushed.keys() == local.keys()
        assert {name for name in pushed if pushed[name] != local[name].read_bytes()} == {"README.md", "export.json"}
        assert pushed["README.md"].decode() == local["README.md"].read_text().replace('"tiles"', '"someone/tiles"')
        assert {*hub.cards} == {pushed["README.md"].decode()}  # that the Hub is asked to validate
        for name, described in json.loads(pushed["export.json"])["files"].items():
            found = {"bytes": len(pushed[name]), "sha256": hashlib.sha256(pushed[name]).hexdigest()}
            assert described == found, name

        def push_again() -> subprocess.CompletedProcess:
            return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)

        (tmp_path / "tiles/notes.txt").write_text("private")  # and the same command after an interruption
        hub.files["someone/tiles"] = {}
        assert push_again().returncode == 0
        assert hub.files["someone/tiles"] == pushed
        weights, commits = tmp_path / "tiles/model.safetensors", len(hub.cards)
        content = weights.read_bytes()
        weights.write_bytes(content[:100])
        refused = push_again()
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
        assert f"model.safetensors: found 100 bytes, expected {len(content)} bytes" in refused.stderr
        assert len(hub.cards) == commits
        cache = {"endpoint": hub.endpoint, "cache_dir": tmp_path / "cache"}
        model, tokenizer = load_pretrained("someone/tiles", **cache)
        assert class_names("someone/tiles", **cache) == class_names(exported)
    images = generate_images(*load_pretrained(exported), [3, 1])
    np.testing.assert_array_equal(generate_images(model, tokenizer, [3, 1]), images)
    offline = load_pretrained("someone/tiles", cache_dir=tmp_path / "cache", local_files_only=True)
    np.testing.assert_array_equal(generate_images(*offline, [3, 1]), images)
