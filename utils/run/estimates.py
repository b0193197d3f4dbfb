"""Estimates of what a run costs: FLOPs and activations of an image, memory of each process, size of a checkpoint."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from utils.precision import in_bf16
from utils.schema import Config
from utils.token_ids import LARGE_CODEBOOK, LOGITS_IN_SLICE

GIB = 2**30
MOMENTS = {"Muon": 1}  # by optimizer, each as large as the parameters
ADAM_MOMENTS = 2
# Bytes that the backward pass needs of a position in a block, per hidden size and per MLP width, counted with torch's
# saved_tensors_hooks, with dropout; the key says whether matrix products are in bf16.
BLOCK_BYTES = {True: (80, 6), False: (112, 12)}
LOGIT_BYTES = {True: 2, False: 4}  # per position and code
RESIDUAL_BYTES = 4  # per position and hidden size: what activation checkpointing keeps of a block
# Dense bf16 peak in FLOP/s by part of the device's name, from NVIDIA's data sheets; the first match counts.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A40": 150e12,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU; None: unknown."""
    if "MIG" in device_name:  # a part of a GPU
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)


@dataclass
class TrainingCost:
    """Cost of training on one image."""

    flops: float  # of forward and backward pass
    activation_bytes: float  # kept for the backward pass


def training_cost(model: nn.Module, config: Config, slices: int = 1) -> TrainingCost:
    """Average cost of an image. FLOPs as in PaLM, appendix B (https://arxiv.org/abs/2204.02311): 6 per weight and
    position, and 12 L D T for attention (L blocks, D hidden size, T positions). Lookup tables cost none; adaLN counts
    once per label of a micro-batch, as if all classes had equally many images.

    Args:
        model: the generator; its `no_weight_decay()` names the lookup tables.
        slices: micro-batches of all ranks in a step; the classes of a step are divided among them.
    """
    generator, batch_size = config.model.generator, config.training.per_gpu_batch_size
    bf16 = in_bf16(config.training, next(model.parameters()).device)
    length, size, layers = generator.image_seq_len + 2, generator.hidden_size, generator.num_hidden_layers

    classes = generator.condition_num_classes
    labels = classes * (1 - (1 - 1 / classes) ** (batch_size * slices)) / slices + 1  # and the null class
    tables = model.no_weight_decay()  # type: ignore[operator]
    weights = sum(p.numel() for name, p in model.named_parameters() if name not in tables)
    adaln = sum(p.numel() for name, p in model.named_parameters() if "adaLN_modulation" in name)
    weights_per_image = weights - adaln * max(0, 1 - labels / batch_size)

    per_size, per_width = BLOCK_BYTES[bf16]
    block = per_size * size + per_width * generator.intermediate_size
    codebook_size = config.model.vq_model.codebook_size
    logits: float = codebook_size * length
    if codebook_size > LARGE_CODEBOOK:  # a slice of the micro-batch at a time
        logits = min(logits, LOGITS_IN_SLICE / batch_size)
    blocks = RESIDUAL_BYTES * size * layers + block if generator.use_checkpoint else block * layers
    return TrainingCost(
        flops=(6 * weights_per_image + 12 * layers * size * length) * length,
        activation_bytes=blocks * length + LOGIT_BYTES[bf16] * logits,
    )


@dataclass
class MemoryEstimate:
    parameters: int  # of the model
    bytes_by_kind: dict[str, float]  # of each process
    checkpoint_bytes: float  # on disk

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in self.bytes_by_kind.items())
        total = sum(self.bytes_by_kind.values()) / GIB
        millions = self.parameters / 1e6
        return f"{millions:.1f} M parameters; memory of each process in GiB, estimated: {kinds}, together {total:.2f}"


def memory_estimate(
    modules: Mapping[str, nn.Module],
    optimizers: Iterable[Optimizer],
    shards: int = 1,
    activation_bytes: float | None = None,
    micro_steps: int = 1,
) -> MemoryEstimate:
    """
    Args:
        modules: by name, as in a checkpoint, with the model as `model`; sharded or not.
        optimizers: the optimizers of their parameters.
        shards: processes that each module is sharded over.
        activation_bytes: size of a micro-batch's activations; None: unknown.
        micro_steps: with more than one, each process keeps whole gradients between them.
    """
    sizes = {name: _num_bytes(module.state_dict().values()) for name, module in modules.items()}
    gradients = moments = 0
    for optimizer in optimizers:
        updated = _num_bytes(parameter for group in optimizer.param_groups for parameter in group["params"])
        gradients += updated
        moments += updated * MOMENTS.get(type(optimizer).__name__, ADAM_MOMENTS)
    by_kind = {
        "weights": sizes["model"] / shards,
        "gradients": gradients / (shards if micro_steps == 1 else 1),
        "optimizer": moments / shards,
        **{name: size / shards for name, size in sizes.items() if name != "model"},
    }
    if activation_bytes is not None:
        by_kind["activations"] = activation_bytes
    parameters = sum(parameter.numel() for parameter in modules["model"].parameters())
    return MemoryEstimate(parameters, by_kind, checkpoint_bytes=sum(sizes.values()) + moments)


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
