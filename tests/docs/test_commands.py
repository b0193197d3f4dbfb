"""Files, config keys, options and variables of every documented command exist.

tests/scripts runs them: the quick start in test_quickstart.py, your own images in test_own_images.py, training,
sampling and scoring in test_published_commands.py.
"""

import argparse
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from scripts.quickstart_report import NEXT
from tests.docs.pages import PAGES, ROOT, commands, commands_of, fences, page_name
from utils.config import load_config
from utils.config_checks import accumulation_steps
from utils.studies.plan import read_plan

OF_THE_REPORT = commands_of(NEXT.format(folder="outputs/quickstart"))
COMMANDS = sorted({command for page in PAGES for command in commands(page)} | {*OF_THE_REPORT})
# By commands: make_config.py, export_model.py.
WRITTEN_BY_OTHERS = re.compile(r"outputs/\w+/((rear|tokenizer)\.yaml|config\.json)")
BROUGHT = {"LOC_synset_mapping.txt"}
OF_OTHER_PROGRAMS = ("pip ", "pre-commit ", "ruff ", "source ", "python -m venv", "python -m pytest", "export ")
OF_OTHER_PROGRAMS += ("apt-get ", "dpkg ")
OVERRIDE = re.compile(r"(config|[a-z_]+(\.[a-z_0-9]+)+)=.*", flags=re.DOTALL)


class ParsedError(BaseException):
    """Ends a script when its arguments have been parsed."""


def split(command: str) -> tuple[dict[str, str], list[str]]:
    """Variables in front of a command, and its words without a launcher, whose own options are parsed here."""
    words = [WRITTEN_BY_OTHERS.sub("configs/rear_blue_marble.yaml", word) for word in shlex.split(command)]
    variables = {}
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, variables[name] = words.pop(0).partition("=")
    if words[0] == "torchrun":
        launch = get_args_parser().parse_args(words[1:])
        words = ["python", launch.training_script, *launch.training_script_args]
    elif words[:2] == ["accelerate", "launch"]:
        launch = launch_command_parser().parse_args(words[2:])
        words = ["python", launch.training_script, *launch.training_script_args]
    return variables, words


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_fenced_block_is_checked(page: Path) -> None:
    """Here the commands; in test_seams.py the examples of extending.md, in test_export_model.py those of python.md, in
    test_pages.py how to cite."""
    assert {language for language, _ in fences(page)} <= {"bash", "python", "yaml", "bibtex"}
    assert page.name in ("extending.md", "python.md") or "python" not in dict(fences(page))
    assert page.read_text().count("```") == 2 * len(fences(page))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_yaml_blocks_are_configs(page: Path, tmp_path: Path) -> None:
    for language, text in fences(page):
        if language == "yaml":
            (tmp_path / "block.yaml").write_text(text)
            load_config([f"config={tmp_path / 'block.yaml'}", "experiment.output_dir=unused"])


def test_the_two_commands_of_the_readme() -> None:
    assert commands(ROOT / "README.md")[:2] == ["bash scripts_bash/quickstart.sh", "bash scripts_bash/test.sh"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_what_exists(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables, words = split(command)
    for word in (word.removeprefix("config=") for word in words):
        if re.fullmatch(r"[\w./]+\.(py|sh|yaml|sbatch|txt)", word):
            assert word in BROUGHT or (ROOT / word).is_file(), word
    if command.startswith((*OF_OTHER_PROGRAMS, "python docs/examples/")):  # those: run by test_example_scripts.py
        return
    script = next(word for word in words if re.fullmatch(r"[\w/]+\.(py|sh|sbatch)|utils\.config", word))
    if script.endswith((".sh", ".sbatch")):
        text = (ROOT / script).read_text()
        text += (ROOT / "scripts_bash/environment.sh").read_text() if "environment.sh" in text else ""
        assert all(re.search(rf"\b{name}\b", text) for name in variables), variables
    check_arguments(script, words[words.index(script) + 1 :], monkeypatch)


def test_more_machines_keep_the_batch_of_the_recipe() -> None:
    checked = 0
    for command in COMMANDS:
        if nodes := re.search(r"NUM_NODES=(\d+)|--nodes (\d+)", command):
            overrides = [word for word in split(command)[1] if OVERRIDE.fullmatch(word)]
            config = load_config([f"config={ROOT}/configs/rear_b.yaml", "experiment.output_dir=unused", *overrides])
            processes = 8 * int(nodes[1] or nodes[2])
            steps = accumulation_steps(config.training, processes)
            assert steps * processes * config.training.per_gpu_batch_size == 2048, command
            checked += 1
    assert checked == 2


def test_the_hooks_run_the_installed_ruff() -> None:
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"]  # nothing is fetched
    for hook in repositories[0]["hooks"]:
        command = [sys.executable, "-m", *hook["entry"].split(), __file__]
        assert hook["entry"].startswith("ruff ")
        assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


def check_study(arguments: list[str]) -> None:
    """`reference` is made by an earlier command."""
    words = [word for word in arguments if "=" in word]
    path = next(word.removeprefix("config=") for word in words if word.startswith("config="))
    has_reference = "reference" in yaml.safe_load((ROOT / path).read_text())
    _, others = read_plan([*words, *([f"reference={ROOT}/README.md"] if has_reference else [])])
    assert {*others} <= {"workers"}
    assert {*arguments} - {*words} <= {"report", "--status"}


def check_arguments(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if script == "scripts_bash/fashion_study.sh" and not arguments:
        return  # only the data
    if script in ("scripts/study.py", "scripts_bash/slurm_study.sbatch", "scripts_bash/fashion_study.sh"):
        check_study(arguments)
        return
    if script == "scripts_bash/own_images.sh":  # its options are those of make_config.py
        script, arguments = "scripts/make_config.py", [arguments[0], "unused", *arguments[1:]]
    overrides = [word for word in arguments if OVERRIDE.fullmatch(word)]
    if overrides:
        paths = [word.replace("config=", f"config={ROOT}/") for word in overrides]
        load_config(["experiment.output_dir=unused", *paths])
    others = [word for word in arguments if word not in overrides]
    if script in ("scripts_bash/download.sh", "scripts_bash/gpu_check.sh"):
        script = script.replace("_bash", "").replace(".sh", ".py")
    if script.endswith(".py") and (not overrides or others):
        parse(script, arguments, monkeypatch)
    elif script == "scripts_bash/test.sh":
        assert others[::2] in ([], ["-k"], ["-m"])  # pytest's
    else:
        assert set(others) <= {"--keys", "--help"}


def parse(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the script parse these arguments, and no more."""

    def ending(original: Callable[..., object]) -> Callable[..., None]:
        def parse_and_end(*given: object, **more: object) -> None:
            original(*given, **more)
            raise ParsedError

        return parse_and_end

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, ending(getattr(argparse.ArgumentParser, name)))
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    with pytest.raises(ParsedError):
        runpy.run_path(str(ROOT / script), run_name="__main__")
