"""Kernel launches of the product's steps on a GPU, counted without one (`gpu_compiler.py`).

Legend: B images, S sequences (B; with guidance 2 B), D hidden size.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from modeling import rear
from modeling import training_step as training_step_module
from modeling.perturbation import num_perturbation_uniforms
from modeling.rear import ReAR
from modeling.sampling import cached_decoding
from modeling.sampling import generate as generate_module
from modeling.sampling.cached_decoding import MODULATED, DecodingState, compile_for_decoding
from modeling.sampling.generate import bucket_end, next_codes, sample_next_codes
from modeling.targets.registry import Targets
from modeling.tokenizers.registry import build_tokenizer
from modeling.training_step import compile_block, compile_blocks, training_step
from scripts.benchmarks.gpu_compiler import GPU, CompiledGraph, GpuCompiler, Launch
from utils.schema import Config


@dataclass
class Counted:
    """A step of a model with few blocks: its launches, those that each further block adds, and what was compiled."""

    launches: list[Launch]
    per_block: list[Launch]
    blocks: int
    graphs: list[CompiledGraph]


def with_blocks(config: Config, blocks: int, **changes: Any) -> Config:
    generator = replace(config.model.generator, num_hidden_layers=blocks, **changes)
    return replace(config, model=replace(config.model, generator=generator))


@contextmanager
def code_of_gpus() -> Iterator[None]:
    """Decoding takes the branches of a GPU."""
    with ExitStack() as stack:
        for module in (cached_decoding, generate_module):
            stack.enter_context(mock.patch.object(module, "on_gpu", return_value=True))
        yield


def mean_length(steps: int) -> int:
    """Length of the attention, on average over the positions of an image."""
    ends = [bucket_end(position) for position in range(2, steps + 1)]
    return round(sum(ends) / len(ends))


def decode_step(
    compiler: GpuCompiler, config: Config, images: int, guided: bool, dtype: torch.dtype = torch.bfloat16
) -> Counted:
    """A step of sampling as it is captured in a CUDA graph, with attention of the mean length."""
    blocks = 2
    generator = config.model.generator
    with torch.inference_mode(), code_of_gpus():
        state = decoding_state(compiler, with_blocks(config, blocks), images, guided, dtype)
        state.set_compiled(True)
        scales = torch.empty(generator.image_seq_len, device="cuda")
        sample = compile_for_decoding(sample_next_codes, torch.device("cuda"))
        end = mean_length(generator.image_seq_len)
        with compiler.counting() as ledger:
            next_codes(state, scales, generator, end, masked=True, sample=sample)
    (between,) = (graph for graph in ledger.graphs if graph.name == "between_attentions")
    attention = next(launch for launch in ledger.launches if launch.kind == "eager")
    return Counted(ledger.launches, [*between.launches, attention], blocks, ledger.graphs)


def fill_modulations(compiler: GpuCompiler, config: Config, images: int, guided: bool) -> Counted:
    """The modulations of `MODULATED` positions; each image has another class."""
    with torch.inference_mode(), code_of_gpus():
        state = decoding_state(compiler, with_blocks(config, 1), images, guided)
        state.set_compiled(True)
        state.distinct_labels = torch.empty(state.max_labels, dtype=torch.int64, device="cuda")
        with compiler.counting() as ledger:
            state.fill_modulations(MODULATED)
    return Counted(ledger.launches, ledger.graphs[0].launches, 1, ledger.graphs)


def decoding_state(
    compiler: GpuCompiler, config: Config, images: int, guided: bool, dtype: torch.dtype = torch.bfloat16
) -> DecodingState:
    torch._dynamo.reset()
    model = compiler.put(ReAR(ReAR.sampling_config(config.model)).eval())
    return DecodingState(model, images, guided, dtype)


def compiled_blocks(compiler: GpuCompiler, config: Config, images: int) -> list[CompiledGraph]:
    """What `compile_blocks` compiles: a block for a fixed and for any number of labels, forward and backward."""
    torch._dynamo.reset()
    config = training_config(config, images, checkpointing=False)
    model = compiler.put(ReAR(config.model), "cpu")

    def as_on_gpu(block: nn.Module, device: torch.device) -> None:
        compile_block(block, GPU)

    with mock.patch.object(training_step_module, "compile_block", as_on_gpu), compiler.counting() as ledger:
        compile_blocks(model, config, torch.device("cpu"))
    return ledger.graphs


def train_step(compiler: GpuCompiler, config: Config, images: int, checkpointing: bool = False) -> Counted:
    """Forward and backward pass of a micro-batch of codes with compiled blocks in bf16, without the optimizer."""
    config = training_config(config, images, checkpointing)
    tokenizer = compiler.put(build_tokenizer(config.model.vq_model).eval().requires_grad_(False), "cpu")
    torch._dynamo.reset()
    model = compiler.put(ReAR(config.model), "cpu").train()
    for block in model.blocks:
        compile_block(block, GPU)
    labels = min(images, model.num_classes)
    batch = {
        "codes": torch.empty(images, model.image_seq_len, dtype=torch.int32),
        "class_labels": torch.empty(labels, dtype=torch.int64),
        "class_rows": torch.empty(images, dtype=torch.int64),
        "perturbation_uniforms": torch.empty(images, num_perturbation_uniforms(model.image_seq_len)),
    }
    with ExitStack() as stack:
        for name in ("checked_codes", "checked_class_labels"):  # they look at values on a CPU
            stack.enter_context(mock.patch.object(rear, name, as_it_is))
        ledger = stack.enter_context(compiler.counting())
        training_step(model, tokenizer, batch, 0.5, config, Targets(config, tokenizer)).loss.backward()
    per_block = [launch for launch in ledger.launches if launch.kind != "eager"]  # all that is compiled is the block
    return Counted(ledger.launches, per_block, 1, ledger.graphs)


def training_config(config: Config, images: int, checkpointing: bool) -> Config:
    """Of one block, read by all taps, in bf16."""
    config = with_blocks(config, 1, use_checkpoint=checkpointing, encode_align_layer_idx=0, decode_align_layer_idx=0)
    training = replace(config.training, compile="on", mixed_precision="bf16", per_gpu_batch_size=images)
    return replace(config, training=training)


def as_it_is(tensor: Tensor, *_: object, **__: object) -> Tensor:
    return tensor


def optimizer_step(config: Config) -> list[Launch]:
    """Of the published recipe: the norm of all gradients, their scaling, and fused AdamW, in float32."""
    parameters = count_parameters(config)
    return [
        Launch("library", "gradient norm", 4 * parameters, 0),
        Launch("library", "gradient clipping", 8 * parameters, 0),
        Launch("library", "fused AdamW", 28 * parameters, 0),
    ]


def count_parameters(config: Config) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in ReAR(config.model).parameters())
