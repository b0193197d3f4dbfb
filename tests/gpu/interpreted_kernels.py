"""Runs the Triton kernels that Inductor generates for a GPU in Triton's interpreter, next to the graphs that they were
generated from, and prints the relative differences as JSON {function: difference}.

Started by `test_interpreted_kernels.py` with TRITON_INTERPRET=1. The program that launches the kernels is Inductor's
own, on CPU tensors. The interpreter cannot call libdevice, so that Triton's functions of the same names replace it.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime import triton_heuristics
from torch.utils._pytree import tree_leaves

from modeling.rear import ReAR
from modeling.training_step import compile_block
from scripts.benchmarks import gpu_compiler
from scripts.benchmarks.gpu_compiler import CompiledGraph, GpuCompiler, driver_answers
from scripts.benchmarks.gpu_counts import decode_step, training_config
from scripts.benchmarks.kernels import compiled_loss
from tests.gpu.fake_gpu import attention
from utils.config import load_config
from utils.schema import Config


class Kernel:
    """In place of Inductor's launcher: runs a kernel in the interpreter, with the first of its configurations."""

    def __init__(self, name: str, source: str, **_: Any) -> None:
        module = PyCodeCache.load(source)
        module.libdevice = tl.math  # type: ignore[attr-defined]
        self.launcher = getattr(module, name)

    def run(self, *arguments: Any, stream: int) -> None:
        config = self.launcher.configs[0]
        names = [name for name in self.launcher.fn.arg_names if name not in config.kwargs]
        named = dict(zip(names, arguments, strict=True)) | config.kwargs
        grid = triton_heuristics.GridExpr.from_meta(self.launcher.inductor_meta, config).eval_slow(named)
        self.launcher.fn[grid](**named)


@contextmanager
def on_cpu() -> Iterator[None]:
    """What Inductor's program asks of a GPU."""
    with (
        driver_answers(),
        mock.patch.object(AsyncCompile, "triton", lambda self, name, source, **options: Kernel(name, source)),
        mock.patch.object(torch.cuda, "_DeviceGuard", return_value=nullcontext()),
        mock.patch.object(torch.cuda, "set_device"),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", return_value=0),
        mock.patch.object(torch._C._dynamo.guards, "_empty_strided_cuda", empty),
    ):
        yield


def empty(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype)


def run_program(code: str, inputs: list[Tensor]) -> list[Tensor]:
    with on_cpu():
        return list(PyCodeCache.load(code).call(list(inputs)))  # type: ignore[attr-defined]


def main() -> None:
    sizes = ["hidden_size=64", "num_attention_heads=4", "intermediate_size=128", "image_seq_len=16"]
    arguments = ["experiment.output_dir=unused", "model.vq_model.resolution=64"]
    config = load_config([*arguments, *(f"model.generator.{size}" for size in sizes), "model.generator.dropout=0"])
    differences = {}
    for dtype in (torch.float32, torch.bfloat16):
        for compiled, graph in compiled_graphs(config, dtype):
            differences[f"{compiled.name}, {dtype}"] = difference(compiled, graph)
    print(json.dumps(differences))


def compiled_graphs(config: Config, dtype: torch.dtype) -> list[tuple[CompiledGraph, torch.fx.GraphModule]]:
    kept: list[tuple[CompiledGraph, torch.fx.GraphModule]] = []
    lower = gpu_compiler.lower

    def keeping(name: str, graph: torch.fx.GraphModule, inputs: list[Any], **modes: Any) -> CompiledGraph:
        compiled = lower(name, graph, inputs, **modes)
        kept.append((compiled, graph))
        return compiled

    with (
        mock.patch.object(gpu_compiler, "lower", keeping),
        GpuCompiler() as compiler,
        mock.patch.object(F, "scaled_dot_product_attention", attention),  # a CPU has no flash kernel
    ):
        decode_step(compiler, config, images=4, guided=True, dtype=dtype)
        compiled_loss(compiler, config, images=2, dtype=dtype)
        torch._dynamo.reset()
        block = compiler.put(ReAR(training_config(config, 4, checkpointing=False).model), "cpu").train().blocks[0]
        compile_block(block, gpu_compiler.GPU)
        x, condition = (torch.empty(size, 18, 64, requires_grad=True) for size in (4, 3))
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            block(x, condition, torch.empty(4, dtype=torch.int64)).sum().backward()
    return kept


def difference(compiled: CompiledGraph, graph: torch.fx.GraphModule) -> float:
    """The largest, relative to the largest value of each result, on made-up inputs."""
    generator = torch.Generator().manual_seed(0)
    metas = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    inputs = [made_up(meta, generator) for meta in metas]
    if compiled.name == "sample_next_codes":  # some codes are not given
        inputs = [-tensor if tensor.dtype == torch.int64 and tensor.dim() == 2 else tensor for tensor in inputs]
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = node.kwargs | {"device": torch.device("cpu")}
    graph.recompile()
    copies = [torch.empty_strided(one.shape, one.stride(), dtype=one.dtype).copy_(one) for one in inputs]
    with torch.no_grad():
        expected, found = tree_leaves(graph.forward(*inputs)), run_program(compiled.code, copies)
    if not compiled.name.endswith("backward"):  # which reuses the memory of inputs; others write to some, as the cache
        expected, found = expected + inputs, found + copies
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        if isinstance(theirs, Tensor):
            scale = theirs.double().abs().max().clamp(min=1e-6)
            worst = max(worst, ((ours.double() - theirs.double()).abs().max() / scale).item())
    return worst


def made_up(meta: Tensor, generator: torch.Generator) -> Tensor:
    tensor = torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype)
    if meta.is_floating_point():
        return tensor.copy_(torch.rand(meta.shape, generator=generator) - 0.3)
    return tensor.copy_(torch.randint(0, 3, meta.shape, generator=generator))


if __name__ == "__main__":
    main()
