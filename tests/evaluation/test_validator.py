"""Validation losses against a loop over the codes, and what they must not depend on or change."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data.validation_data import open_validation_data, validation_batches
from evaluation.validator import (
    ValidationLosses,
    ValidationTokens,
    draw_loss_by_position,
    perturbed,
    validation_losses,
)
from modeling.loading import load_tokenizer
from modeling.rear import ReAR
from tests.conftest import make_noise_images
from tests.processes import run_ranks
from utils.config import load_config
from utils.distributed import DistributedContext, init_distributed
from utils.run.sharding import SHARDS_ON_CPU, parallelize
from utils.schema import Config, TrainingConfig

ALONE = DistributedContext(0, 1, torch.device("cpu"))


def load(arguments: list[str], *more: str) -> Config:
    dropout = ("model.generator.dropout=0.5", "model.generator.attn_drop=0.5")
    return load_config([*arguments, "experiment.output_dir=unused", "training.per_gpu_batch_size=4", *dropout, *more])


def random_model(config: Config) -> ReAR:
    """In training mode, with random weights everywhere."""
    torch.manual_seed(0)
    model = ReAR(config.model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.train()


def random_tokens(count: int) -> ValidationTokens:
    random = torch.Generator().manual_seed(1)
    codes = torch.randint(24, (count, 16), generator=random, dtype=torch.int32)
    return ValidationTokens(codes, perturbed(codes, 24), torch.randint(5, (count,), generator=random))


def test_a_loop_over_samples_and_positions_gives_the_same(tiny_arguments: list[str]) -> None:
    config, validation = load(tiny_arguments), random_tokens(11)
    model = random_model(config)
    result = validation_losses(model, validation, config, ALONE)
    model.eval()
    clean, perturbed_context, correct = torch.zeros(11, 16), torch.zeros(11, 16), 0
    for losses, contexts in ((clean, validation.codes), (perturbed_context, validation.perturbed_codes)):
        for i, (context, label) in enumerate(zip(contexts, validation.class_labels, strict=True)):
            with torch.no_grad():
                logits = model(context[None], label[None]).logits[0]
            for position, code in enumerate(validation.codes[i].tolist()):
                losses[i, position] = logits[position].logsumexp(0) - logits[position, code]
                correct += int(losses is clean and logits[position].argmax() == code)
    assert result.ar_loss == pytest.approx(clean.double().mean().item(), abs=1e-6)
    assert result.ar_loss_perturbed == pytest.approx(perturbed_context.double().mean().item(), abs=1e-6)
    assert abs(result.ar_loss - result.ar_loss_perturbed) > 1e-3
    assert result.correct_tokens == pytest.approx(correct / (11 * 16), abs=1e-12)
    np.testing.assert_allclose(result.by_position, clean.double().mean(0), atol=2e-6)
    values = [result.ar_loss, result.correct_tokens, result.ar_loss_perturbed]
    assert result.metrics == dict(zip(("val/ar_loss", "val/correct_tokens", "val/ar_loss_noisy"), values, strict=True))


def test_training_goes_on_as_if_nothing_had_been_computed(tiny_arguments: list[str]) -> None:
    config, validation = load(tiny_arguments), random_tokens(6)
    model, state = random_model(config), torch.get_rng_state()
    of_training = validation_losses(model, validation, config, ALONE)
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    of_evaluation = validation_losses(model.eval(), validation, config, ALONE)
    assert not model.training
    assert of_training.metrics == of_evaluation.metrics  # no dropout in either
    with pytest.raises(ValueError, match="class_labels"):
        validation_losses(model.train(), ValidationTokens(*[validation.codes] * 3), config, ALONE)
    assert model.training


def test_the_precision_is_that_of_training(tiny_arguments: list[str]) -> None:
    validation, losses = random_tokens(6), []
    for precision in ("no", "bf16"):
        config = load(tiny_arguments, f"training.mixed_precision={precision}")
        losses.append(validation_losses(random_model(config), validation, config, ALONE).ar_loss)
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_a_tenth_of_the_context_is_replaced_always_in_the_same_way() -> None:
    codes = torch.randint(512, (5000, 64), dtype=torch.int32, generator=torch.manual_seed(0))
    changed = perturbed(codes, 512)
    shares = (changed != codes).double().mean(1)
    assert abs(shares.mean() - 0.1 * 511 / 512) < 0.002
    assert shares.std() < 0.05  # no ratio of its own for each row
    assert changed.dtype == torch.int32
    assert changed.min() >= 0
    assert changed.max() < 512
    assert torch.equal(perturbed(codes[:100], 512), changed[:100])
    assert not torch.equal(perturbed(codes[1:101], 512)[:99], changed[1:100])


def compute(arguments: list[str], output: Path, ctx: DistributedContext, fsdp: bool = False) -> ValidationLosses:
    """Tokenize and evaluate; what the rank found goes to a file."""
    config = load(arguments, "model.generator.transition_alignment=false")  # DDP wants all parameters in the loss
    tokenizer, model = load_tokenizer(config), random_model(config)
    dataset = open_validation_data(config, tokenizer.sha256())
    validation = ValidationTokens.gather(validation_batches(dataset, config, ctx), len(dataset), tokenizer, ctx)
    parallel = parallelize(model, model.blocks, ctx, TrainingConfig(fsdp=fsdp, mixed_precision="no"))
    for _ in range(2):  # training goes on in between
        losses = validation_losses(parallel, validation, config, ctx)
        parallel(validation.codes[:4], validation.class_labels[:4]).logits.mean().backward()
    arrays = {"codes": validation.codes, "perturbed": validation.perturbed_codes, "labels": validation.class_labels}
    np.savez(f"{output}.{ctx.rank}.npz", losses=[*losses.metrics.values(), *losses.by_position], **arrays)
    return losses


def compute_on_rank(arguments: list[str], output: Path, fsdp: bool) -> None:
    with init_distributed() as ctx:
        compute(arguments, output, ctx, fsdp)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "fsdp",
    [False, pytest.param(True, marks=pytest.mark.skipif(not SHARDS_ON_CPU, reason="this torch shards on GPUs only"))],
)
@pytest.mark.parametrize("form", ["codes", "images"])
def test_two_processes_give_the_same_bits(
    tiny_arguments: list[str], tiny_config_file: Path, tmp_path: Path, form: str, fsdp: bool
) -> None:
    """11 images in 3 batches, so that a rank is left without one; 50 codes in 13."""
    images = make_noise_images(tmp_path / "images", 5, 20, 24)
    (images / "dog/9.png").write_bytes((images / "dog/0.png").read_bytes())
    (images / "cat/3.png").write_bytes(b"broken")
    key, path = ("shards_path_or_url", images) if form == "images" else ("pretokenization", "codes.jsonl")
    arguments = [
        *tiny_arguments,
        *("experiment.eval_every=1", "dataset.params.on_bad_sample=skip", "dataset.params.max_bad_fraction=0.1"),
        f"dataset.params.eval_{key}={tiny_config_file.parent / path}",
    ]
    torch.set_num_threads(1)
    losses = compute(arguments, tmp_path / "one", ALONE)
    run_ranks(compute_on_rank, arguments, tmp_path / "two", fsdp, processes=2)
    one = dict(np.load(tmp_path / "one.0.npz"))
    assert len(one["codes"]) == (10 if form == "images" else 50)
    assert np.isfinite(losses.by_position).all()
    for rank in range(2):
        two = np.load(tmp_path / f"two.{rank}.npz")
        for name, array in one.items():
            np.testing.assert_array_equal(two[name], array)


def test_samples_that_cannot_be_read_are_left_out(tiny_arguments: list[str]) -> None:
    tokenizer, images = load_tokenizer(load(tiny_arguments)), torch.rand(5, 3, 16, 16)

    def batch(*rows: int) -> dict[str, Tensor]:
        index = torch.tensor(rows)
        return {"index": index, "class_labels": index % 5, "image": images[index], "readable": index != 2}

    validation = ValidationTokens.gather([batch(3, 4), batch(0, 1, 2)], 5, tokenizer, ALONE)
    assert validation.class_labels.tolist() == [0, 1, 3, 4]
    assert torch.equal(validation.codes.long(), tokenizer.encode(images)[[0, 1, 3, 4]])


def test_the_picture_has_a_map_where_the_codes_have_a_grid() -> None:
    losses = np.linspace(6, 4, 16)
    square, line = draw_loss_by_position(losses, (4, 4), 7), draw_loss_by_position(losses, (16,), 7)
    assert square.size == (960, 380)
    assert line.size == (560, 380)
    colours = np.asarray(square)[60:300, 560:860].reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) >= 16
    assert square != draw_loss_by_position(losses[::-1], (4, 4), 7)
    assert square != draw_loss_by_position(losses, (2, 8), 7)
