"""What is compiled on a GPU, compiled here for Hopper: the kernels are those of the table in docs/gpu.md, and faults
are found. In processes of their own, since `scripts/benchmarks/gpu_compiler.py` answers in place of the driver."""

import importlib.util
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from utils.config import ROOT

PAGE = Path(ROOT / "docs/gpu.md").read_text(encoding="utf-8")
HEADER = "| part | function | Triton kernels | library calls |"
FAULTS = {  # a function of the decoding step, what is found in it, and what is put in its place
    ".item()": ("embed_newest", "state.position)", "state.position + state.position.item())"),
    "float64 constant": (
        "embed_newest",
        "x[:, None],",
        "(x * torch.ones((), dtype=torch.float64, device=x.device))[:, None],",
    ),
    "CPU tensor": ("embed_newest", "device=x.device", "device='cpu'"),
    "branch on a value": ("embed_newest", "if masked:", "if masked and state.position < 32:"),
    "none": ("embed_newest", "if masked:", "if masked:"),
}
SABOTAGE = """
import inspect, json, sys, textwrap
import torch
import torch.nn.functional as F
from modeling import losses
from scripts.benchmarks.gpu_compiler import GpuCompiler
from scripts.benchmarks.gpu_counts import code_of_gpus, decoding_state
from scripts.benchmarks.kernels import compiled_loss
from modeling.sampling import cached_decoding
from utils.config import load_config

sizes = ["hidden_size=64", "num_attention_heads=4", "intermediate_size=128", "image_seq_len=64"]
config = load_config(["experiment.output_dir=unused", "model.vq_model.resolution=128",
                      *(f"model.generator.{size}" for size in sizes)])
found = {}
with GpuCompiler() as compiler:
    for fault, (name, old, new) in json.loads(sys.argv[1]).items():
        original = getattr(cached_decoding, name)
        source = textwrap.dedent(inspect.getsource(original))
        assert old in source
        exec(source.replace(old, new), vars(cached_decoding))
        try:
            with torch.inference_mode(), code_of_gpus(), compiler.counting() as ledger:
                state = decoding_state(compiler, config, images=2, guided=True)
                state.set_compiled(True)
                state.embed_newest(state, masked=True)
            found[fault] = [problem for graph in ledger.graphs for problem in graph.problems]
        except Exception as error:
            found[fault] = [repr(error)[:2000]]
        setattr(cached_decoding, name, original)
    config = load_config(["experiment.output_dir=unused"])
    for fault in ("none", "all logits in float32"):
        if fault != "none":
            losses.token_losses = lambda logits, codes: F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())
        graphs = compiled_loss(compiler, config, 128)
        found[f"loss: {fault}"] = [problem for graph in graphs for problem in graph.problems]
print(json.dumps(found))
"""
LABELS = """
import torch
from modeling.rear import ReAR
from modeling.training_step import compile_blocks
from scripts.benchmarks.gpu_compiler import GpuCompiler
from scripts.benchmarks.gpu_counts import training_config
from utils.config import load_config

config = load_config(["experiment.output_dir=unused", "model.generator.hidden_size=64",
                      "model.generator.num_attention_heads=4", "model.generator.intermediate_size=128"])
config = training_config(config, 16, checkpointing=False)
compiled = []
with GpuCompiler() as compiler, compiler.counting() as ledger:
    model = compiler.put(ReAR(config.model), "cpu")
    compile_blocks(model, config, torch.device("cpu"))
    for labels in (2, 5, 16, 3):
        compiled.append(len(ledger.graphs))
        x, condition = (torch.empty(size, 258, 64, requires_grad=True) for size in (16, labels))
        with torch.autocast("cpu", torch.bfloat16):
            model.blocks[0](x, condition, torch.empty(16, dtype=torch.int64)).sum().backward()
print(compiled, len(ledger.graphs))
"""

RELEASE = torch.__version__.split("+")[0]

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(
        not torch.backends.cuda.is_built() or importlib.util.find_spec("triton") is None,
        reason="needs torch's CUDA build and Triton",
    ),
    pytest.mark.skipif(
        f"torch {RELEASE}" not in PAGE, reason=f"docs/gpu.md has the kernels of another torch than {RELEASE}"
    ),
]


def kept_table() -> dict[tuple[str, str], tuple[int, int]]:
    """(Triton kernels, library calls) by part and function, of docs/gpu.md."""
    lines = PAGE[PAGE.index(HEADER) :].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {(part, function): (int(triton), int(library)) for part, function, triton, library, *_ in rows}


def compiled(*arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, ROOT / "scripts/benchmark.py", "kernels", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])["rows"]


def counts(rows: list[dict[str, Any]]) -> dict[tuple[str, str], tuple[int, int]]:
    return {(row["part"], row["function"]): (row["triton"], row["library"]) for row in rows}


def test_kernels_of_the_decode_step() -> None:
    found = counts(compiled("--models", "b", "--parts", "decode"))
    kept = kept_table()
    assert found == {key: kept[key] for key in found}
    assert sum(found["decode step, reAR-B", "between_attentions"]) + 1 == 9  # and the attention: of each layer


@pytest.mark.slow
def test_kernels_of_everything() -> None:
    assert counts(compiled()) == kept_table()


def in_a_process(script: str, *arguments: str) -> str:
    """Last line of its output."""
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


def test_faults_are_found() -> None:
    found = json.loads(in_a_process(SABOTAGE, json.dumps(FAULTS)))
    assert not found.pop("none")
    assert not found.pop("loss: none")
    assert all(found.values()), found


@pytest.mark.slow
def test_blocks_are_compiled_once_for_any_number_of_labels() -> None:
    assert in_a_process(LABELS) == "[4, 4, 4, 4] 4"
