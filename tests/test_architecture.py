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
SPLIT_SCRIPTS = ("scripts/benchmark", "scripts/gpu_check", "scripts/demo")  # may import their own folder
SOURCES = {
    str(path.relative_to(ROOT)): path.read_text()
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
