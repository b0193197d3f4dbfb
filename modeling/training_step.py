"""One micro-batch of training, from codes or images to the loss.

Legend: B images, N codes per image, H x W pixels; T = N + 2 positions, D hidden size, F width within the MLPs, L
blocks, V codebook size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modeling.losses import LossTerms, drop_class_labels, rear_loss
from modeling.noise import add_noise, num_noise_uniforms
from modeling.orders import training_orders
from modeling.rear import ReAR
from modeling.tokenizers.tokenizer import Tokenizer
from utils.schema import Config, GeneratorConfig

# Bytes that the backward pass needs of a position in a block, per D and per F; counted with torch's
# saved_tensors_hooks, with dropout. By whether matrix products are in bf16.
BLOCK_BYTES = {True: (80, 6), False: (112, 12)}
LOGIT_BYTES = {True: 10, False: 12}  # per position and code, with the softmax of the loss
RESIDUAL_BYTES = 4  # per position and D: all that activation checkpointing keeps of a block


def num_uniforms(image_seq_len: int) -> int:
    """Uniforms that `training_step` gets for each image: one for dropping its class label, then those of the noise."""
    return 1 + num_noise_uniforms(image_seq_len)


def num_order_uniforms(generator: GeneratorConfig) -> int:
    """As `order_uniforms`: one that chooses between raster order and another, then N for that."""
    return 0 if generator.order == "raster" else 1 + generator.image_seq_len


def training_step(
    model: nn.Module,
    tokenizer: Tokenizer,
    batch: dict[str, Tensor],
    max_ratio: float,
    config: Config,
    order_ratio: float = 0.0,
) -> LossTerms:
    """Noise the context, run the model, compute the loss: one micro-batch of B images.

    Args:
        batch: on the model's device, `class_labels` (B,), `codes` (B, N) or `image` (B, 3, H, W), and `uniforms` (B,
            `num_uniforms`): random numbers in [0, 1) of these samples at this step; with an `order_ratio` also
            `order_uniforms` (B, 1 + N).
        max_ratio: f(t), largest share of replaced codes.
        order_ratio: share of the samples that are not in raster order.
    """
    generator = config.model.generator
    # (B, N); images as by `encode`, whose checks would wait for the GPU at every step
    codes = batch["codes"] if "codes" in batch else tokenizer.look_up(tokenizer.features(batch["image"]))
    label_uniforms, noise_uniforms = batch["uniforms"][:, 0], batch["uniforms"][:, 1:]
    context, perturbation_mask = add_noise(codes, noise_uniforms, max_ratio, config.model)
    class_labels = drop_class_labels(
        batch["class_labels"], label_uniforms, generator.class_label_dropout, generator.condition_num_classes
    )
    orders = training_orders(batch["order_uniforms"], order_ratio, generator) if order_ratio > 0 else None
    with torch.autocast(codes.device.type, torch.bfloat16, enabled=config.training.mixed_precision == "bf16"):
        output = model(context, class_labels, orders)
    if orders is not None:  # what the outputs are compared with stands as they do
        codes, perturbation_mask = codes.gather(1, orders), perturbation_mask.gather(1, orders)
    return rear_loss(output, codes, tokenizer.embed(codes), perturbation_mask, generator)


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
