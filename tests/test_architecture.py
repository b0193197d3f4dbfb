"""Which package may import what, and what code knows of a tokenizer: one test per rule, over all files."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from modeling.tokenizers.registry import TOKENIZERS
from modeling.tokenizers.tokenizer import Tokenizer, TrainableTokenizer

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "utils": {"utils"},
    "modeling": {"modeling", "utils"},
    "data": {"data", "utils"},
    "evaluation": {"evaluation", "utils"},
    "scripts": {"modeling", "data", "evaluation", "utils"},
}
SHARED = {"evaluation": "modeling.encoders."}  # the networks that the loss and the scores look at images with
JOIN_PACKAGES = {"evaluation/make_reference.py", "evaluation/validator.py"}  # as scripts do
# May import their own folder; make_config.py measures steps of the trainings.
SPLIT_SCRIPTS = ("scripts/benchmark", "scripts/gpu_check", "scripts/demo", "scripts/make_config")
SOURCES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for package in MAY_IMPORT
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imported_modules(source: str) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            modules.add(node.module)
    return modules


def test_imports_go_one_way() -> None:
    for name, source in SOURCES.items():
        package = "scripts" if name in JOIN_PACKAGES else name.split("/")[0]
        allowed = MAY_IMPORT[package] | ({"scripts"} if name.startswith(SPLIT_SCRIPTS) else set())
        modules = imported_modules(source)
        restricted = {module for module in modules if not module.startswith(SHARED.get(package, "nothing"))}
        assert {module.split(".")[0] for module in restricted} & set(MAY_IMPORT) <= allowed, name
        if package != "scripts":
            assert "accelerate" not in modules, name
            assert "wandb" not in modules or name == "utils/run/tracking.py", name


def test_the_regularizer_can_be_copied_elsewhere() -> None:
    modules = {module.split(".")[0] for module in imported_modules(SOURCES["modeling/robust_embedding.py"])}
    assert modules - sys.stdlib_module_names == {"torch"}


RUN_MACHINERY = ("utils.run", "matplotlib", "wandb", "accelerate")


def test_modeling_needs_no_run() -> None:
    for name, source in SOURCES.items():
        if name.startswith("modeling/"):
            assert not [module for module in imported_modules(source) if module.startswith(RUN_MACHINERY)], name


def test_the_losses_import_little_of_the_project() -> None:
    program = "import sys, modeling.losses; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    ours = [module for module in run.stdout.split() if module.split(".")[0] in MAY_IMPORT]
    assert len(ours) < 8, ours


TOKENIZER_FOLDER = "modeling/tokenizers/"
TRAINS_A_TOKENIZER = "scripts/train_tokenizer.py"  # the one script that needs more than the common interface
SHARED_MODULES = {"modeling.tokenizers.registry", "modeling.tokenizers.tokenizer"}
TRAINING_MODULES = {f"modeling.tokenizers.{name}" for name in ("discriminator", "perceptual", "vector_quantizer")}


def test_no_tokenizer_is_named_outside_its_folder() -> None:
    concrete = re.compile("|".join(rf"[\"'=]{name}\b|\b{kind.__name__}\b" for name, kind in TOKENIZERS.items()))
    for name, source in SOURCES.items():
        if name.startswith(TOKENIZER_FOLDER):
            continue
        assert name == "utils/schema.py" or not concrete.findall(source), name  # the schema lists the choices
        imported = {module for module in imported_modules(source) if module.startswith("modeling.tokenizers")}
        assert imported <= SHARED_MODULES | (TRAINING_MODULES if name == TRAINS_A_TOKENIZER else set()), name


def test_tokenizers_are_used_by_their_common_interface() -> None:
    for name, source in SOURCES.items():
        if not name.startswith(TOKENIZER_FOLDER):
            kind = TrainableTokenizer if name == TRAINS_A_TOKENIZER else Tokenizer
            unknown = set(attributes_of("tokenizer", source)) - {*dir(kind), *Tokenizer.__annotations__}
            assert not unknown, (name, unknown)


def attributes_of(variable: str, source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == variable:
            yield node.attr


def calls(source: str) -> Iterator[tuple[str, str, ast.Call]]:
    """The object ("" for a plain function), the name and the node of each call."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            is_method = isinstance(node.func, ast.Attribute)
            yield ast.unparse(node.func.value) if is_method else "", ast.unparse(node.func).rpartition(".")[2], node


def mode_of(owner: str, call: ast.Call) -> str:
    """Of a call of `open`; "b" for one that has no such argument."""
    position = 0 if owner and owner not in ("io", "os") else 1
    values = [*call.args[position : position + 1], *(word.value for word in call.keywords if word.arg == "mode")]
    return str(values[0].value) if values and isinstance(values[0], ast.Constant) else "r" if not values else "b"


# Objects whose `open` is not that of a file.
OTHER_OPEN = {"os", "Image", "tarfile", "archive", "evaluator", "Validator", "self", "chunk_files", "webbrowser"}


def test_text_is_opened_with_an_encoding() -> None:
    """A locale must not decide what a file means; files that people write are read with `read_text`."""
    for name, source in SOURCES.items():
        for owner, function, call in calls(source):
            words = {word.arg for word in call.keywords}
            is_text = {
                "open": owner not in OTHER_OPEN and "b" not in mode_of(owner, call),
                "read_text": owner != "" and not call.args,
                "write_text": owner != "" and len(call.args) < 2,
                "NamedTemporaryFile": True,
                "fdopen": True,
                "run": owner == "subprocess" and "text" in words,
                "Popen": owner == "subprocess" and "text" in words,
            }.get(function, False)
            assert not is_text or "encoding" in words, (name, call.lineno)


# What opens a file to write to it without `atomic_file`, `atomic_folder` or `ChunkFiles.writing`.
GROWING = {
    ("data/codes/conversion.py", "growing"): "in the folder of chunks; published when it is complete",
    ("data/codes/token_writer.py", "path"): "in an atomic folder",
    ("scripts/benchmarks/data.py", "jsonl"): "in a temporary folder",
    ("scripts/gpu_check.py", "log"): "output of a process",
    ("utils/console.py", ""): "/dev/null",
    ("utils/files/lock.py", "lock_path"): "a lock",
    ("utils/run/metrics_file.py", "self.path"): "grows for the whole run",
    ("utils/run/status.py", "path"): "on a full disk",
    ("utils/studies/runner.py", "log_path"): "output of processes, all attempts",
}
# Renames and deletions of whole folders, in one step each.
RENAMES = {"utils/run/checkpoint.py": "to delete", "utils/run/resume.py": "to keep as a backup"}


def test_all_writes_are_atomic() -> None:
    """Only `utils/files/atomic.py` flushes, renames and sets permissions, so that it alone knows what mounts lack."""
    low_level = {"fsync", "fdatasync", "chmod", "fchmod", "link", "rename", "replace", "copy", "copytree", "move"}
    for name, source in SOURCES.items():
        if name == "utils/files/atomic.py":
            continue
        for owner, function, call in calls(source):
            where = (name, call.lineno)
            if function == "open" and owner not in OTHER_OPEN and set(mode_of(owner, call)) & set("wax+"):
                assert owner in ("partial", "partial_path") or (name, owner) in GROWING, where
            assert owner not in ("os", "shutil") or function not in low_level, where
            assert function not in ("chmod", "write_bytes"), where
            assert function != "write_text" or owner in ("", "partial", "record"), where
            assert function != "rename" or name in RENAMES, where


def test_paths_of_a_command_line_know_the_home_folder() -> None:
    for name, source in SOURCES.items():
        for _, function, call in calls(source):
            types = [ast.unparse(word.value) for word in call.keywords if word.arg == "type"]
            assert function != "add_argument" or types != ["Path"], (name, call.lineno)


def test_bash_scripts_keep_their_line_ends_in_any_checkout() -> None:
    names = [path for suffix in ("*.sh", "*.sbatch") for path in sorted((ROOT / "scripts_bash").glob(suffix))]
    assert not [path.name for path in names if b"\r" in path.read_bytes()]
    patterns = dict(line.split(" ", 1) for line in (ROOT / ".gitattributes").read_text(encoding="utf-8").splitlines())
    assert patterns == {"*.sh": "text eol=lf", "*.sbatch": "text eol=lf", ".ci/*": "text eol=lf"}
