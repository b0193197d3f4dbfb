"""Every script answers --help and finds its modules, from any directory and without PYTHONPATH."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import STANDALONE
from utils.keys import keys_of
from utils.schema import Config

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    path
    for folder in ("scripts", "evaluation")
    for path in sorted((ROOT / folder).glob("*.py"))
    if '\nif __name__ == "__main__":' in path.read_text()
]
WITH_CONFIG = [path for path in SCRIPTS if "\nREADS = " in path.read_text()]


def run(*command: str | Path, cwd: Path, modules: Path | None = None) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "120"} | ({"PYTHONPATH": str(modules)} if modules else {})
    return subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)


def first_paragraph(script: Path) -> str:
    return ast.get_docstring(ast.parse(script.read_text())).split("\n\n")[0]


def test_the_scripts_are_found() -> None:
    assert {"train_rear.py", "make_config.py", "evaluator.py", "make_reference.py"} <= {path.name for path in SCRIPTS}
    assert len(WITH_CONFIG) >= 6


def slow_unless_config(script: Path) -> object:
    """Scripts without a config import torch before they answer --help."""
    return pytest.param(script, marks=[] if script in WITH_CONFIG else [pytest.mark.slow], id=script.name)


@pytest.mark.parametrize("script", [slow_unless_config(script) for script in SCRIPTS])
def test_help_says_what_it_does_and_how_it_is_launched(script: Path, tmp_path: Path) -> None:
    result = run(sys.executable, script, "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert first_paragraph(script) in result.stdout
    assert f"{script.parent.name}/{script.name}" in result.stdout
    assert re.search(r"\b([Ww]rites?|[Pp]rints)\b", result.stdout)


@pytest.mark.parametrize("script", WITH_CONFIG, ids=lambda path: path.name)
def test_help_explains_the_keys_without_torch(script: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    result = run(sys.executable, script, "config=absent.yaml", "-h", cwd=tmp_path, modules=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "model.vq_model.resolution=256" in result.stdout
    assert keys_of(Config)["model.vq_model.resolution"].help in result.stdout
    assert "inspection." not in result.stdout or script.name == "inspect_codes.py"


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("launcher", "name"),
    [
        ([*STANDALONE, "--nproc_per_node=2"], "sample_imagenet_rear.py"),
        (["accelerate.commands.launch", "--num_processes=1", "--num_machines=1", "--mixed_precision=no"]
         + ["--dynamo_backend=no"], "train_rear.py"),
    ],
)  # fmt: skip
def test_launchers_start_scripts_from_any_directory(launcher: list[str], name: str, tmp_path: Path) -> None:
    result = run(sys.executable, "-m", *launcher, ROOT / "scripts" / name, "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert first_paragraph(ROOT / "scripts" / name) in result.stdout


def test_contradictions_matter_where_they_are_read(tmp_path: Path) -> None:
    """The config of a tokenizer's run can be read again, although its generator section does not fit."""
    arguments = ["experiment.output_dir=out", "model.vq_model.resolution=64", "model.generator.image_seq_len=256"]
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    results = {
        name: run(sys.executable, ROOT / f"scripts/{name}.py", *arguments, cwd=tmp_path, modules=tmp_path)
        for name in ("train_tokenizer", "train_rear")
    }
    unread, end = results["train_tokenizer"].stderr.splitlines()
    assert unread == "train_tokenizer.py does not read model.generator.image_seq_len"
    assert end == "torch was imported"
    assert "image_seq_len=256: expected model.vq_model.num_latent_tokens=16\n" in results["train_rear"].stderr
