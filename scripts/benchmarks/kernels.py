"""Compile what runs on a GPU for Hopper, on any machine, and count kernels, library calls, spills and bytes.

Needs torch's CUDA build (Linux) and no GPU. Fails if a function breaks the graph, waits for a value, computes on the
CPU or in float64, or if a kernel spills registers. Bytes are those read and written by one call.
"""

import argparse
import io
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from evaluation.inception import Inception
from modeling import losses
from modeling.tokenizers.registry import build_tokenizer
from scripts.benchmarks.gpu_compiler import CompiledGraph, GpuCompiler, machine_code
from scripts.benchmarks.gpu_counts import compiled_blocks, decode_step, train_step
from utils.arguments import positive
from utils.config import ROOT, load_config
from utils.console import markdown_table
from utils.errors import InputError
from utils.schema import Config

MODELS = ("s", "b", "l")  # reAR-S and -B have blocks of the same size
PARTS = ("decode", "decode-unguided", "training", "loss", "tokenizer", "evaluator")
FLOAT64 = ("sample_next_codes", "Inception")  # cumulative distribution of sampling, class probabilities: by design


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["b", "l"], help="reAR-S, -B, -L; default: b l")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to compile")
    parser.add_argument("--batch", type=positive, default=128, help="images")


@dataclass
class Row:
    """A compiled function."""

    part: str
    function: str
    triton: int
    library: int
    spilled_bytes: int
    mbytes: float
    gflop: float


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """
    Raises:
        InputError: torch without CUDA support, or a function that must not run so on a GPU.
    """
    if not torch.backends.cuda.is_built():
        raise InputError(f"torch {torch.__version__}: built without CUDA, expected a CUDA build to compile for a GPU")
    import triton

    print(f"torch {torch.__version__}, Triton {triton.__version__}, sm_90, batch {arguments.batch}")
    header = ["part", "function", "Triton kernels", "library calls", "spilled bytes", "MB", "GFLOP"]
    print(markdown_table(header, []))
    rows, problems = [], []
    with GpuCompiler() as compiler:
        for part, graph in compiled_graphs(compiler, arguments):
            row = row_of(part, graph)
            rows.append(row)
            cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in asdict(row).values()]
            print(f"| {' | '.join(cells)} |", flush=True)  # one by one, since each takes seconds
            problems += [f"{part}: {graph.name}: {problem}" for problem in problems_of(graph, row)]
    if problems:
        raise InputError("\n".join(problems))
    return {"torch": torch.__version__, "triton": triton.__version__, "rows": [asdict(row) for row in rows]}


def compiled_graphs(compiler: GpuCompiler, arguments: argparse.Namespace) -> Iterator[tuple[str, CompiledGraph]]:
    """Each with the part of the product that it belongs to."""
    for model in arguments.models:
        config = load_config([f"config={ROOT}/configs/rear_{model}.yaml", "experiment.output_dir=unused"])
        name = f"reAR-{model.upper()}"
        for guided, decode in ((True, "decode"), (False, "decode-unguided")):
            if decode in arguments.parts:
                part = f"decode step, {name}" + ("" if guided else ", unguided")
                yield from ((part, graph) for graph in decode_step(compiler, config, arguments.batch, guided).graphs)
        if "training" in arguments.parts:
            for i, graph in enumerate(compiled_blocks(compiler, config, arguments.batch)):
                labels = "2 labels" if i < 2 else "any labels"
                yield f"training, {name}, {labels}", graph
            checkpointed = train_step(compiler, config, arguments.batch, checkpointing=True)
            yield from ((f"training, {name}, checkpointing", graph) for graph in checkpointed.graphs)
    config = load_config([f"config={ROOT}/configs/rear_b.yaml", "experiment.output_dir=unused"])
    if "loss" in arguments.parts:
        yield from (("loss", graph) for graph in compiled_loss(compiler, config, arguments.batch))
    if "tokenizer" in arguments.parts:
        yield from (("tokenizer", graph) for graph in compiled_tokenizer(compiler, config))
    if "evaluator" in arguments.parts:
        yield "evaluator", compiled_inception(compiler)


def compiled_loss(
    compiler: GpuCompiler, config: Config, images: int, dtype: torch.dtype = torch.bfloat16
) -> list[CompiledGraph]:
    """Cross-entropy of logits of a type, forward and backward: compiled, and uncompiled as training runs it. A kernel
    that writes as many float32 elements as there are logits is a problem."""
    torch._dynamo.reset()
    codes = config.model.generator.image_seq_len
    logits = torch.empty(images, codes, config.model.vq_model.codebook_size, dtype=dtype, requires_grad=True)
    targets = torch.empty(images, codes, dtype=torch.int64)
    with compiler.counting() as ledger:
        torch.compile(losses.next_token_loss)(logits, targets).backward()
    with compiler.counting() as uncompiled:
        losses.next_token_loss(logits, targets).backward()
    graphs = [*ledger.graphs, CompiledGraph("next_token_loss, uncompiled", uncompiled.launches, [], [])]
    for graph in graphs:
        for launch in graph.launches:
            if launch.float32 >= logits.numel():
                graph.problems.append(f"{launch.name}: writes all {logits.numel()} logits in float32, expected slices")
    return graphs


def compiled_tokenizer(compiler: GpuCompiler, config: Config, images: int = 8) -> list[CompiledGraph]:
    """Encoder in float32, and decoder in float16 as sampling uses it."""
    torch._dynamo.reset()
    tokenizer = build_tokenizer(config.model.vq_model).eval().requires_grad_(False)
    resolution = config.model.vq_model.resolution
    with torch.inference_mode(), compiler.counting() as ledger:
        decoder = compiler.put(tokenizer.fast_decoder(), dtype=torch.float16)
        torch.compile(compiler.put(tokenizer).encode_latents)(
            torch.empty(images, 3, resolution, resolution, device="cuda")
        )
        torch.compile(decoder)(torch.empty(images, tokenizer.image_seq_len, dtype=torch.int64, device="cuda"))
    for graph, name in zip(ledger.graphs, ("encoder, float32", "decoder, float16"), strict=True):
        graph.name = name
    return ledger.graphs


def compiled_inception(compiler: GpuCompiler, images: int = 8) -> CompiledGraph:
    """The Inception network of FID in float32, with weights of no meaning."""
    torch._dynamo.reset()
    with _disable_current_modes(), tempfile.TemporaryDirectory() as folder:  # its weights are files
        weights = Path(folder) / "inception.pth"
        torch.save(empty_inception_weights(), weights)
        inception = Inception(torch.device("cpu"), weights)
    compiler.put(inception.network)
    inception.classifier = torch.empty(inception.classifier.shape, dtype=torch.float64, device="cuda")
    with torch.inference_mode(), compiler.counting() as ledger:
        torch.compile(inception.__call__)(torch.empty(images, 256, 256, 3, dtype=torch.uint8, device="cuda"))
    (graph,) = ledger.graphs
    graph.name = "Inception"
    return graph


def empty_inception_weights() -> dict[str, Tensor]:
    """Zeros by key of torch-fidelity's network, which cannot be built without weights: here it loads none."""
    from torch_fidelity import FeatureExtractorInceptionV3

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=nothing)
    return {name: torch.zeros_like(value) for name, value in network.state_dict().items() if value.dim()}


def row_of(part: str, graph: CompiledGraph) -> Row:
    kinds = [launch.kind for launch in graph.launches]
    return Row(
        part=part,
        function=graph.name,
        triton=kinds.count("triton"),
        library=len(kinds) - kinds.count("triton"),
        spilled_bytes=sum(machine_code(name, source).spilled_bytes for name, source in graph.sources),
        mbytes=sum(launch.bytes for launch in graph.launches) / 1e6,
        gflop=sum(launch.flops for launch in graph.launches) / 1e9,
    )


def problems_of(graph: CompiledGraph, row: Row) -> list[str]:
    found = [problem for problem in graph.problems if not ("float64" in problem and graph.name in FLOAT64)]
    if row.spilled_bytes:
        found.append(f"{row.spilled_bytes} bytes of registers spilled, expected 0")
    return found
