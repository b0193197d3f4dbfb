"""One micro-batch of training, from codes or images to the loss.

Legend: B images, N codes per image, H x W pixels.
"""

import torch
from torch import Tensor, nn

from modeling.losses import LossTerms, drop_class_labels, rear_loss
from modeling.noise import add_noise, num_noise_uniforms
from modeling.tokenizers.tokenizer import Tokenizer
from utils.schema import Config


def num_uniforms(image_seq_len: int) -> int:
    """Uniforms that `training_step` gets for each image: one for dropping its class label, then those of the noise."""
    return 1 + num_noise_uniforms(image_seq_len)


def training_step(
    model: nn.Module,
    tokenizer: Tokenizer,
    batch: dict[str, Tensor],
    uniforms: Tensor,
    max_ratio: float,
    config: Config,
) -> LossTerms:
    """Noise the context, run the model, compute the loss: one micro-batch of B images.

    Args:
        batch: `class_labels` (B,) and `codes` (B, N) or `image` (B, 3, H, W), on the model's device.
        uniforms: (B, `num_uniforms`) random numbers in [0, 1) of these samples at this step.
        max_ratio: f(t), largest share of replaced codes.
    """
    generator = config.model.generator
    # (B, N); images as by `encode`, whose checks would wait for the GPU at every step
    codes = batch["codes"] if "codes" in batch else tokenizer.look_up(tokenizer.features(batch["image"]))
    uniforms = uniforms.to(codes.device)
    context, perturbation_mask = add_noise(codes, uniforms[:, 1:], max_ratio, config.model)
    class_labels = drop_class_labels(
        batch["class_labels"], uniforms[:, 0], generator.class_label_dropout, generator.condition_num_classes
    )
    with torch.autocast(codes.device.type, torch.bfloat16, enabled=config.training.mixed_precision == "bf16"):
        output = model(context, class_labels)
    return rear_loss(output, codes, tokenizer.embed(codes), perturbation_mask, generator)
