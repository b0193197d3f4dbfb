"""Imports go one way."""

import ast
import re
import sys
from pathlib import Path

import pytest

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
JOIN_PACKAGES = {"evaluation/make_reference.py", "evaluation/validator.py"}  # as scripts do
SOURCES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules.add(node.module)
    return modules


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    package = "scripts" if name in JOIN_PACKAGES else name.split("/")[0]
    modules = imported_modules(path)
    runs_scripts = name.startswith(("scripts/benchmark", "scripts/gpu_check", "scripts/demo"))
    allowed = MAY_IMPORT[package] | ({"scripts"} if runs_scripts else set())
    inside = {module.split(".")[0] for module in modules} & set(MAY_IMPORT)
    assert inside <= allowed
    if package != "scripts":
        assert "accelerate" not in modules
        assert "wandb" not in modules or path.name == "tracking.py"


def test_the_regularizer_can_be_copied_elsewhere() -> None:
    modules = {module.split(".")[0] for module in imported_modules(ROOT / "modeling/robust_embedding.py")}
    assert modules - sys.stdlib_module_names == {"torch"}


TRAINS_A_TOKENIZER = "scripts/train_tokenizer.py"  # needs more of one than the others do
TRAINING_MODULES = {f"modeling.tokenizers.{name}" for name in ("discriminator", "perceptual", "vector_quantizer")}
CONCRETE = re.compile("|".join(rf"[\"'=]{name}\b|\b{kind.__name__}\b" for name, kind in TOKENIZERS.items()))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tokenizers_are_known_by_what_all_of_them_offer(path: Path) -> None:
    """No concrete one is named outside their folder, and of an object called tokenizer only the common part is used."""
    name = str(path.relative_to(ROOT))
    if name.startswith("modeling/tokenizers/"):
        return
    if name != "utils/schema.py":  # which has the choices
        assert not CONCRETE.findall(path.read_text())
    trains = name == TRAINS_A_TOKENIZER
    named = {module for module in imported_modules(path) if module.startswith("modeling.tokenizers")}
    general = {"modeling.tokenizers.registry", "modeling.tokenizers.tokenizer"}
    assert named <= (general | TRAINING_MODULES if trains else general)
    offered = {*dir(TrainableTokenizer if trains else Tokenizer), *Tokenizer.__annotations__}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tokenizer":
            assert node.attr in offered, f"{path}:{node.lineno} tokenizer.{node.attr}"
