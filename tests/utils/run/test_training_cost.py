"""The estimates of the cost of training, compared with counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling.losses import next_token_loss
from modeling.rear import ReAR
from utils.config import load_config
from utils.run.estimates import training_cost
from utils.schema import Config

BATCH = 16


def config_of(*overrides: str) -> Config:
    generator = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 512}
    sizes = [f"model.generator.{name}={value}" for name, value in generator.items()]
    others = ["model.generator.decode_align_layer_idx=3", "model.vq_model.resolution=128", "experiment.output_dir=x"]
    return load_config([*sizes, *others, "model.generator.transition_alignment=false", *overrides])


def forward_loss(model: ReAR, config: Config) -> torch.Tensor:
    codes = torch.randint(0, 1024, (BATCH, 64))
    with torch.autocast("cpu", torch.bfloat16, enabled=config.training.mixed_precision == "bf16"):
        output = model.train()(codes, torch.zeros(BATCH, dtype=torch.long))
    return next_token_loss(output.logits, codes)


@pytest.mark.parametrize(("classes", "slices"), [(10**6, 1), (5, 1), (32, 4)])
def test_flops_are_those_that_torch_counts(classes: int, slices: int) -> None:
    """With as many labels as an average micro-batch has: all different, 5 and null, 8 and null."""
    config = config_of("training.mixed_precision=no", f"training.per_gpu_batch_size={BATCH}")
    labels = {10**6: 16, 5: 6, 32: 8}[classes]
    config.model.generator.condition_num_classes = 32
    model = ReAR(config.model).train()
    config.model.generator.condition_num_classes = classes
    rows = torch.arange(BATCH) % labels
    with FlopCounterMode(display=False) as counter:
        codes = torch.zeros(BATCH, 64, dtype=torch.int64)
        next_token_loss(model(codes, torch.arange(labels), class_rows=rows).logits, codes).backward()
    assert training_cost(model, config, slices).flops * BATCH == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_flops_of_attention_are_those_that_torch_counts() -> None:
    """With so many and so narrow tokens that attention is most of the cost."""
    sizes = {"hidden_size": 32, "num_attention_heads": 1, "intermediate_size": 32}
    overrides = [*(f"model.generator.{name}={value}" for name, value in sizes.items()), "model.vq_model.resolution=512"]
    config = config_of(*overrides, "model.vq_model.codebook_size=8", "training.per_gpu_batch_size=1")
    model = ReAR(config.model).train()
    with FlopCounterMode(display=False) as counter:
        codes = torch.zeros(1, 1024, dtype=torch.int64)
        next_token_loss(model(codes, torch.zeros(1, dtype=torch.int64)).logits, codes).backward()
    counted = counter.get_flop_counts()["Global"]
    of_attention = sum(flops for op, flops in counted.items() if "attention" in str(op) or "bmm" in str(op))
    assert of_attention > 0.7 * counter.get_total_flops()
    assert training_cost(model, config).flops == pytest.approx(counter.get_total_flops(), rel=0.1)


def kept_bytes(model: ReAR, config: Config) -> int:
    """By the forward pass for the backward pass."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward_loss(model, config)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_activations_are_about_what_the_backward_pass_needs(precision: str) -> None:
    whole = config_of(f"training.mixed_precision={precision}")
    model = ReAR(whole.model)
    estimate = training_cost(model, whole).activation_bytes * BATCH
    assert estimate == pytest.approx(kept_bytes(model, whole), rel=0.25)
    checkpointed = config_of(f"training.mixed_precision={precision}", "model.generator.use_checkpoint=true")
    model = ReAR(checkpointed.model)
    with_a_block = training_cost(model, checkpointed).activation_bytes * BATCH
    assert (
        kept_bytes(model, checkpointed) < with_a_block < estimate / 2
    )  # that of the block in work comes to what is kept
