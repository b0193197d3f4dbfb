"""One micro-batch of training, from codes or images to the loss.

Legend: B images, N codes per image, H x W pixels.
"""

import torch
from torch import Tensor, nn

from modeling.losses import LossTerms, rear_loss
from modeling.orders import training_orders
from modeling.perturbation import perturb
from modeling.rear import ReAR
from modeling.targets.registry import Targets
from modeling.tokenizers.tokenizer import Tokenizer
from utils.precision import autocast
from utils.schema import Config


def training_step(
    model: nn.Module,
    tokenizer: Tokenizer,
    batch: dict[str, Tensor],
    max_ratio: float,
    config: Config,
    targets: Targets,
    order_ratio: float = 0.0,
    step: int = 0,
) -> LossTerms:
    """Perturb the context, run the model, compute the loss: one micro-batch of B images.

    Args:
        batch: on the model's device, `class_labels` (U,) and `class_rows` (B,) as `ReAR.forward` takes them, `codes`
            (B, N) or `image` (B, 3, H, W), and `perturbation_uniforms` (B, `num_perturbation_uniforms`) in [0, 1); with
            an `order_ratio` also `order_uniforms` (B, 1 + N). Some targets need `image` too.
        max_ratio: largest perturbation ratio of an image at this step.
        targets: targets of the model's taps.
        order_ratio: share of the images that are not in raster order.
        step: the current step, since a tap may have ended.
    """
    generator = config.model.generator
    # (B, N); not `tokenizer.encode`, whose checks wait for the GPU
    codes = batch["codes"] if "codes" in batch else tokenizer.quantize_latents(tokenizer.encode_latents(batch["image"]))
    context, perturbation_mask = perturb(codes, batch["perturbation_uniforms"], max_ratio, config.model)
    orders = training_orders(batch["order_uniforms"], order_ratio, generator) if order_ratio > 0 else None
    vectors = targets(targets.active(step), codes, batch, orders)  # (B, N, Z) by tap
    if orders is not None:  # targets in the order of the outputs
        codes, perturbation_mask = codes.gather(1, orders), perturbation_mask.gather(1, orders)
    with autocast(config.training, codes.device):
        output = model(context, batch["class_labels"], orders, batch["class_rows"], codes)
    return rear_loss(
        logits=output.logits,
        projections=output.projections,
        codes=codes,
        targets=vectors,
        perturbation_mask=perturbation_mask,
        taps=targets.taps,
        config=generator,
    )


def compile_block(block: nn.Module, device: torch.device) -> None:
    """On a GPU, independent kernels are combined, such as the conversions of weights to bf16."""
    block.compile(options={"combo_kernels": True} if device.type == "cuda" else None)


def compile_blocks(model: ReAR, config: Config, device: torch.device) -> list[str]:
    """Compile the blocks in place for training, as `training.compile` says, by a pass on dummy inputs.

    Returns log lines: with `auto`, why the blocks were not compiled. With `on`, a compiler error is raised.
    """
    training = config.training
    if training.compile == "off" or (training.compile == "auto" and (device.type == "cpu" or training.fsdp)):
        return []
    size, shape = training.per_gpu_batch_size, (model.image_seq_len + 2, config.model.generator.hidden_size)
    try:
        for block in model.blocks:
            compile_block(block, device)
        rows = torch.zeros(size, dtype=torch.int64, device=device)
        for labels in (2, 3):  # the second time with a symbolic number of labels
            x, condition = (torch.zeros(n, *shape, device=device, requires_grad=True) for n in (size, labels))
            with autocast(training, device):
                model.train().blocks[0](x, condition, rows).sum().backward()
    except Exception as error:  # compilers raise errors of many kinds
        if training.compile == "on":
            raise
        for block in model.blocks:
            block._compiled_call_impl = None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return [f"training.compile=auto: the blocks run uncompiled, since compiling them failed: {reason}"]
    finally:
        model.zero_grad(set_to_none=True)
    return []
