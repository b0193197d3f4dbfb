"""CONTRIBUTING.md's lists of the files that a change touches are correct.

The examples of docs/extending.md say in their first line where they go. They are added to a copy of the sources, must
touch the files of their row and no others, and there must work.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import FENCE, ROOT

SOURCES = ("data", "evaluation", "modeling", "scripts", "utils", "tests")
PLACE = re.compile(r"# (?P<file>[\w/]+\.py), (?P<how>new|at the end|below|in place of)(?:: (?P<anchor>.+))?\n")
# By row of the table: the section of the page that has its example, if there is one.
SECTIONS = {
    "loss term": "A new loss term",
    "perturbation of the context": "Another perturbation of the context",
    "tokenizer": "Another tokenizer",
    "order of the codes": "Another order of the codes",
    "metric": "Another metric",
    "config key": None,  # that of the loss term is one
    "optimizer": "Another optimizer or schedule",
    "schedule": None,  # as an optimizer
    "reason to stop": "A reason to stop",
    "script": "A new script",
}
# Tests of the examples in the copy, in addition to their own.
TOYS_TEST = """
from matplotlib.axes import Axes
from pytest import approx
from scripts.train_rear import main
from utils.config import load_config
from utils.run.metrics_file import read_metrics


def test_the_trainer_takes_them(tiny_arguments, tmp_path, monkeypatch):
    titles, original = [], Axes.set_title
    monkeypatch.setattr(Axes, "set_title", lambda self, title: titles.append(title) or original(self, title))
    toys = ["model.generator.entropy_weight=0.5", "model.generator.perturb_mode=shift", "optimizer.name=sgd"]
    toys += ["model.generator.order=columns", "sampling.order=columns"]
    main(load_config([*tiny_arguments, *toys, f"experiment.output_dir={tmp_path}", "training.max_train_steps=2"]))
    for row in read_metrics(tmp_path / "metrics.jsonl"):
        assert row["train/entropy"] > 0
        sum_of_terms = row["train/ar_loss"] + row["train/proj_loss"] + 0.5 * row["train/entropy"]
        assert row["train/loss"] == approx(sum_of_terms, rel=1e-5)
    assert "train/entropy" in titles
    assert (tmp_path / "training_curves.png").is_file()
"""
COLOURS_TEST = """
import numpy as np
from modeling.tokenizers.registry import build_tokenizer
from scripts import inspect_codes, pretokenize, reconstruct, sample_imagenet_rear, train_rear
from tests.conftest import make_noise_images
from tests.script_config import script_config
from utils.config import load_config
from utils.files.weights import save_weights


def test_the_scripts_take_the_tokenizer(tiny_arguments, tmp_path):
    sizes = ["model_type=colours", "resolution=12", "num_latent_tokens=9", "token_size=3"]
    images = make_noise_images(tmp_path / "images", 4, 12, 12)
    arguments = [
        *tiny_arguments,
        *(f"model.vq_model.{size}" for size in sizes),
        *("model.generator.image_seq_len=9", "model.generator.z_dim=3"),
        *("dataset.preprocessing.crop_size=12", "dataset.preprocessing.resize_shorter_edge=12"),
        *(f"dataset.params.{split}_shards_path_or_url={images}" for split in ("train", "eval")),
        f"dataset.params.pretokenization={tmp_path / 'codes.tokens'}",
        f"experiment.tokenizer_checkpoint={tmp_path / 'colours.safetensors'}",
        *("training.max_train_steps=1", "sampling.num_fid_samples=4"),
    ]

    def run(script, name, *more):
        script.main(script_config(script, [*arguments, f"experiment.output_dir={tmp_path / name}", *more]))

    config = load_config([*arguments, "experiment.output_dir=unused"])
    save_weights(build_tokenizer(config.model.vq_model).state_dict(), tmp_path / "colours.safetensors")
    run(pretokenize, "unused")
    run(inspect_codes, "codes")
    run(train_rear, "run")
    run(sample_imagenet_rear, "samples", f"experiment.generator_checkpoint={tmp_path / 'run'}")
    run(reconstruct, "reconstructions")
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (4, 12, 12, 3)
    assert (tmp_path / "reconstructions/reconstructions.npz").is_file()
"""
IN_THE_COPY = (
    *(
        "tests/test_colours.py",
        "tests/test_toys.py",
        "tests/test_architecture.py",
        "tests/scripts/test_count_parameters.py",
    ),
    *("tests/modeling/test_losses.py", "tests/modeling/test_perturbation.py", "tests/utils/test_optim.py"),
    "tests/scripts/test_train_rear.py::test_a_run_ends_when_the_validation_loss_stalls",
    *("tests/modeling/tokenizers/test_conformance.py::test_every_tokenizer_conforms", "tests/utils/test_schedules.py"),
    "tests/modeling/tokenizers/test_conformance.py::test_sizes_are_read_from_the_weights",
    "tests/modeling/tokenizers/test_conformance.py::test_the_config_names_the_tokenizers_of_the_table",
    "tests/modeling/test_orders.py::test_columns",
    "tests/modeling/test_orders.py::test_the_config_names_the_orders_of_the_table",
    "tests/evaluation/test_evaluator.py::test_printed_lines_are_those_of_the_original",
)


def rows() -> dict[str, list[str]]:
    """By kind: files, and folders for a new file, from the table of CONTRIBUTING.md."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## What a change touches\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| ([a-z ]+) \| (.*) \|$", section, re.MULTILINE)
    return {kind: re.findall(r"`([\w/]+/(?:\w+\.\w+)?)`", files) for kind, files in cells if kind != "new"}


def examples(section: str) -> list[str]:
    text = (ROOT / "docs/extending.md").read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    return [code for language, code in FENCE.findall(text) if language == "python"]


def apply(example: str, root: Path) -> str:
    """Put an example where its first line says; the file that it touches."""
    place = PLACE.match(example)
    assert place, example
    code, path, anchor = example[place.end() :], root / place["file"], place["anchor"]
    if place["how"] == "new":
        assert not path.exists()
        path.write_text(code)
        return place["file"]
    text = path.read_text()
    if place["how"] == "at the end":
        text += code
    else:
        assert text.count(anchor) == 1, f"{path}: {anchor}"
        before, after = text.split(anchor)
        rest, _, behind = after.partition("\n")
        in_place = place["how"] == "in place of"
        text = f"{before}{code.strip()}{after}" if in_place else f"{before}{anchor}{rest}\n{code}{behind}"
    path.write_text(text)
    return place["file"]


def test_the_table_has_all_kinds_and_at_most_four_files_each() -> None:
    assert list(rows()) == list(SECTIONS)
    for kind in SECTIONS:
        assert 1 <= len(rows()[kind]) <= 4, kind
        for name in rows()[kind]:
            assert (ROOT / name).exists(), name


@pytest.fixture(scope="module")
def touched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, set[str]]]:
    """A copy of the sources with all examples, and the files that those of each kind touch; a folder for new ones."""
    root = tmp_path_factory.mktemp("copy")
    for folder in SOURCES:
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    for name in ("pyproject.toml", ".gitattributes"):
        shutil.copy(ROOT / name, root)
    shutil.copytree(ROOT / "configs", root / "configs")
    by_kind = {}
    for kind, section in SECTIONS.items():
        code = examples(section) if section else []
        files = {(apply(example, root), PLACE.match(example)["how"]) for example in code}
        by_kind[kind] = {f"{Path(file).parent}/" if how == "new" else file for file, how in files}
    return root, by_kind


@pytest.mark.parametrize("kind", [kind for kind, section in SECTIONS.items() if section])
def test_an_example_touches_the_files_of_its_row_and_no_others(
    kind: str, touched: tuple[Path, dict[str, set[str]]]
) -> None:
    assert touched[1][kind] == {name for name in rows()[kind] if not name.startswith("docs/")}


@pytest.mark.slow
def test_the_examples_work(touched: tuple[Path, dict[str, set[str]]]) -> None:
    root = touched[0]
    (root / "tests/test_toys.py").write_text(TOYS_TEST)
    (root / "tests/test_colours.py").write_text(COLOURS_TEST)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *IN_THE_COPY]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:]
    assert "skipped" not in result.stdout
