"""Between two replays of the decode graph nothing waits for the GPU, copies from the host or pins memory. The dry run
sees what operations do; this reads the source, and so sees `print`, and what only some configs reach."""

import ast
import inspect

import pytest

from modeling import blocks
from modeling.sampling import cached_decoding, generate, step_graph

IN_THE_LOOP = {"replay", "next_codes", "fill_modulations", "bucket_end"}  # of `CodeSampler._sample`
# What those call, in a graph or between two; the test says so when a new function is called from there.
REACHED = IN_THE_LOOP | {
    "after_attention",
    "after_last_attention",
    "attend",
    "before_attention",
    "before_first_attention",
    "between_attentions",
    "decode_one_token",
    "embed_newest",
    "filter_logits",
    "fold_norm",
    "forward_position",
    "gather_rows",
    "guide",
    "merge_heads",
    "mlp",
    "modulate",
    "modulation",
    "on_gpu",
    "rows_of_modulations",
    "sample_codes",
    "sample_next_codes",
    "split_heads",
    "update",
    "write_modulations",
}
WAIT = {"item", "tolist", "cpu", "numpy", "synchronize", "nonzero", "unique", "masked_select", "bincount"}
FROM_THE_HOST = {"tensor", "as_tensor", "from_numpy", "pin_memory"}
BUILTINS = {"print", "float", "int", "bool"}  # called with a tensor they wait


def functions() -> dict[str, ast.FunctionDef]:
    """Functions of the modules and methods of their classes."""
    trees = [ast.parse(inspect.getsource(module)) for module in (blocks, cached_decoding, generate, step_graph)]
    bodies = [part.body for tree in trees for part in (tree, *tree.body) if isinstance(part, ast.Module | ast.ClassDef)]
    return {node.name: node for body in bodies for node in body if isinstance(node, ast.FunctionDef)}


def names(node: ast.AST) -> set[str]:
    """Of functions, attributes and keywords."""
    children = list(ast.walk(node))
    found = {child.id for child in children if isinstance(child, ast.Name)}
    found |= {child.attr for child in children if isinstance(child, ast.Attribute)}
    return found | {str(child.arg) for child in children if isinstance(child, ast.keyword)}


def called_builtins(node: ast.AST) -> set[str]:
    calls = [child.func for child in ast.walk(node) if isinstance(child, ast.Call)]
    return {called.id for called in calls if isinstance(called, ast.Name)} & BUILTINS


def forbidden(node: ast.AST) -> set[str]:
    return names(node) & (WAIT | FROM_THE_HOST) | called_builtins(node)


def test_these_functions_run() -> None:
    known = functions()
    loop = next(node for node in ast.walk(known["_sample"]) if isinstance(node, ast.For))
    assert names(loop) & known.keys() == IN_THE_LOOP
    assert not forbidden(loop)
    found, new = set[str](), IN_THE_LOOP
    while new:
        found |= new
        new = set().union(*(names(known[name]) & known.keys() for name in new)) - found
    assert found == REACHED


@pytest.mark.parametrize("name", sorted(REACHED))
def test_nothing_waits_or_touches_the_host(name: str) -> None:
    assert not forbidden(functions()[name])


@pytest.mark.parametrize("fault", ["print(x)", "float(x)", "x.item()", "f(pin_memory=True)", "x.cpu() + 1"])
def test_faults_are_seen(fault: str) -> None:
    assert forbidden(ast.parse(fault))
