"""What one image costs in training, before anything has run.

Legend: T = N + 2 positions, D hidden size, F width within the MLPs, L blocks, V codebook size.
"""

from dataclasses import dataclass

from modeling.rear import ReAR
from utils.schema import Config

# Bytes that the backward pass needs of a position in a block, per D and per F; counted with torch's
# saved_tensors_hooks, with dropout. By whether matrix products are in bf16.
BLOCK_BYTES = {True: (80, 6), False: (112, 12)}
LOGIT_BYTES = {True: 10, False: 12}  # per position and code, with the softmax of the loss
RESIDUAL_BYTES = 4  # per position and D: all that activation checkpointing keeps of a block


@dataclass
class TrainingCost:
    flops: float  # of forward and backward pass
    activation_bytes: float  # kept for the backward pass


def training_cost(model: ReAR, config: Config) -> TrainingCost:
    """Of one image. FLOPs as in PaLM, appendix B (https://arxiv.org/abs/2204.02311): 6 per weight and position, and
    12 L D T for attention; tables that are looked up cost none. Activations are an estimate."""
    generator, bf16 = config.model.generator, config.training.mixed_precision == "bf16"
    length, size, layers = model.image_seq_len + 2, generator.hidden_size, generator.num_hidden_layers
    tables = model.no_weight_decay()
    weights = sum(p.numel() for name, p in model.named_parameters() if name not in tables)
    per_size, per_width = BLOCK_BYTES[bf16]
    block = per_size * size + per_width * generator.intermediate_size
    blocks = RESIDUAL_BYTES * size * layers + block if generator.use_checkpoint else block * layers
    return TrainingCost(
        flops=(6 * weights + 12 * layers * size * length) * length,
        activation_bytes=(blocks + LOGIT_BYTES[bf16] * model.codebook_size) * length,
    )
