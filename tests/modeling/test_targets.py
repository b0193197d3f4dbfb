"""Taps and their targets: what they read, what they train, and what they leave alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from modeling.loading import load_tokenizer
from modeling.losses import rear_loss
from modeling.orders import training_orders
from modeling.rear import ReAR
from modeling.targets.registry import TARGETS, Targets, need_images
from modeling.training_step import training_step
from utils.config import load_config
from utils.errors import InputError
from utils.files.weights import save_weights
from utils.schema import Config, TapConfig

ROOT = Path(__file__).parents[2]
VIT = "test_vit"  # timm's smallest, width 64


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Name of a small vision transformer whose random weights are in a file."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_weights(timm.create_model(VIT, pretrained=False).state_dict(), path)
    return f"timm:{VIT}:{path}"


def load(arguments: list[str], *taps: TapConfig, more: tuple[str, ...] = ()) -> Config:
    config = load_config([*arguments, "experiment.output_dir=unused", *more])
    config.model.generator.taps = list(taps)
    return config


def repa(encoder: str, **changes: object) -> TapConfig:
    return replace(TapConfig("repa", target="encoder", source=encoder, z_dim=64, weight=0.5), **changes)


def model_and_batch(config: Config, count: int = 4) -> tuple[ReAR, dict[str, Tensor]]:
    """Random weights everywhere, and a batch of images with random numbers for a perturbation and an order."""
    torch.manual_seed(0)
    model = ReAR(config.model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    random = torch.Generator().manual_seed(1)
    return model.eval(), {
        "image": torch.rand(count, 3, 16, 16, generator=random),
        "index": torch.arange(count),
        "class_labels": torch.arange(count) % 5,
        "class_rows": torch.arange(count),
        "perturbation_uniforms": torch.rand(count, 33, generator=random),
        "order_uniforms": torch.rand(count, 17, generator=random),
    }


def test_the_term_is_minus_1_if_the_projections_are_the_features(tiny_arguments: list[str], encoder: str) -> None:
    config = load(tiny_arguments, repa(encoder), more=("model.generator.encode_align=false",))
    config.model.generator.decode_align = False
    tokenizer = load_tokenizer(config)
    _, batch = model_and_batch(config)
    targets, codes = Targets(config, tokenizer), tokenizer.encode(batch["image"])
    features = targets(targets.taps, codes, batch)
    assert features["repa"].shape == (4, 16, 64)
    logits, mask = torch.randn(4, 16, 24), torch.zeros(4, 16, dtype=torch.bool)
    terms = rear_loss(logits, features, codes, features, mask, targets.taps, config.model.generator)
    torch.testing.assert_close(terms.metrics["train/proj_loss"], torch.tensor(-0.5))  # weight * -1
    total, number = terms.metrics["train/repa_cos"]
    torch.testing.assert_close(total / number, torch.tensor(1.0))


@pytest.mark.parametrize("positions", ["own", "next"])
def test_the_gradient_reaches_the_blocks_up_to_the_layer(
    tiny_arguments: list[str], encoder: str, positions: str
) -> None:
    """Of REPA's term alone: the cross-entropy has none here."""
    more = ("model.generator.encode_align=false", "model.generator.decode_align=false")
    config = load(tiny_arguments, repa(encoder, layer=1, positions=positions), more=more)
    config.model.generator.num_hidden_layers = 4
    tokenizer = load_tokenizer(config)
    model, batch = model_and_batch(config)
    codes = tokenizer.encode(batch["image"])
    targets = Targets(config, tokenizer)
    output = model(codes, batch["class_labels"])
    logits = output.logits.detach()
    mask = torch.zeros_like(codes, dtype=torch.bool)
    vectors = targets(targets.taps, codes, batch)
    generator = config.model.generator
    rear_loss(logits, output.projections, codes, vectors, mask, targets.taps, generator).loss.backward()
    reached = [any(p.grad is not None and p.grad.any() for p in block.parameters()) for block in model.blocks]
    assert reached == [True, True, False, False]
    assert all(parameter.grad.any() for parameter in model.repa_align_mlp.parameters())
    assert model.lm_head.weight.grad is None


def test_own_reads_where_the_token_is_and_next_where_it_is_predicted(tiny_arguments: list[str]) -> None:
    taps = [TapConfig("a", layer=1, positions="own"), TapConfig("b", layer=1, positions="next")]
    config = load(tiny_arguments, *taps)
    model, batch = model_and_batch(config)
    hidden = []
    model.blocks[1].register_forward_hook(lambda block, inputs, output: hidden.append(output))
    codes = torch.arange(64).view(4, 16) % 24
    projections = model(codes, batch["class_labels"]).projections
    (x,) = hidden  # [cls, class, x1 .. xN]
    assert torch.equal(projections["a"], model.a_align_mlp(x[:, 2:]))
    assert torch.equal(projections["b"], model.b_align_mlp(x[:, 1:-1]))


def test_features_are_gathered_by_the_order_as_codes_are(tiny_arguments: list[str], encoder: str) -> None:
    config = load(tiny_arguments, repa(encoder), more=("model.generator.order=random",))
    tokenizer = load_tokenizer(config)
    _, batch = model_and_batch(config)
    targets, codes = Targets(config, tokenizer), tokenizer.encode(batch["image"])
    orders = training_orders(batch["order_uniforms"], 1.0, config.model.generator)
    raster, ordered = targets(targets.taps, codes, batch), targets(targets.taps, codes, batch, orders)
    assert torch.equal(ordered["encode"], tokenizer.codebook_lookup(codes.gather(1, orders)))
    for image in range(4):
        assert torch.equal(ordered["repa"][image], raster["repa"][image][orders[image]])
    assert not torch.equal(ordered["repa"], raster["repa"])


def test_weight_0_and_a_further_tap_leave_the_initial_weights(tiny_arguments: list[str], encoder: str) -> None:
    states = []
    for taps in ([], [repa(encoder, weight=0.0)], [repa(encoder), TapConfig("more")]):
        torch.manual_seed(3)
        states.append(ReAR(load(tiny_arguments, *taps).model).state_dict())
    without, of_weight_0, with_others = states
    assert without.keys() == of_weight_0.keys() < with_others.keys()
    for key, value in without.items():
        assert torch.equal(value, of_weight_0[key])
        assert torch.equal(value, with_others[key]), key
    assert with_others["repa_align_mlp.4.weight"].shape == (64, 16)
    assert with_others["more_align_mlp.4.weight"].std() == pytest.approx(0.02, rel=0.3)


def test_a_tap_ends_and_its_encoder_is_not_asked_any_more(tiny_arguments: list[str], encoder: str) -> None:
    config = load(tiny_arguments, repa(encoder, end_step=5))
    tokenizer = load_tokenizer(config)
    model, batch = model_and_batch(config)
    targets, asked = Targets(config, tokenizer), []
    original = targets.by_tap["repa"].vectors
    targets.by_tap["repa"].vectors = lambda *arguments: asked.append(1) or original(*arguments)
    terms = {step: training_step(model, tokenizer, batch, 0.0, config, targets, step=step) for step in (4, 5)}
    assert len(asked) == 1
    plain = load(tiny_arguments)
    model.taps = model.taps[:2]
    without = training_step(model, tokenizer, batch, 0.0, plain, Targets(plain, tokenizer))
    assert torch.equal(without.loss, terms[5].loss)
    assert terms[4].metrics["train/proj_loss"] != terms[5].metrics["train/proj_loss"]
    assert without.metrics.keys() < terms[5].metrics.keys()
    assert terms[5].metrics["train/repa_cos"][1] == 0


def test_the_permuted_codebook_has_the_same_cost_and_loss_of_step_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the model and the tokenizer of the quick start, and random images."""
    monkeypatch.chdir(ROOT)
    more = ("training.per_gpu_batch_size=32", "experiment.output_dir=unused")
    key = "model.generator.transition_alignment_target=permuted_codebook"
    configs = [load_config(["config=configs/rear_blue_marble.yaml", *more, *keys]) for keys in ([], [key])]
    tokenizer = load_tokenizer(configs[0])
    random = torch.Generator().manual_seed(0)
    batch = {
        "codes": torch.randint(512, (32, 64), generator=random),
        "class_labels": torch.arange(12),
        "class_rows": torch.arange(32) % 12,
        "perturbation_uniforms": torch.rand(32, 129, generator=random),
    }
    losses, vectors, flops = [], [], []
    for config in configs:
        torch.manual_seed(0)
        model, targets = ReAR(config.model).eval(), Targets(config, tokenizer)
        with FlopCounterMode(display=False) as counter:
            losses.append(training_step(model, tokenizer, batch, 1.0, config, targets).loss)
            losses[-1].backward()
        flops.append(counter.get_total_flops())
        vectors.append(targets(targets.taps, batch["codes"], batch))
    assert flops[0] == flops[1] > 1e6
    assert losses[0] != losses[1]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=0.01)
    table = tokenizer.codebook_lookup(torch.arange(512)[None])[0]
    permutation = Targets(configs[1], tokenizer).by_tap["encode"].permutation
    assert permutation.sort().values.tolist() == list(range(512))
    assert (permutation != torch.arange(512)).sum() > 500
    for tap in ("encode", "decode"):
        assert torch.equal(vectors[0][tap], table[batch["codes"]])
        assert torch.equal(vectors[1][tap], table[permutation[batch["codes"]]])
    configs[1].training.seed += 1
    assert not torch.equal(permutation, Targets(configs[1], tokenizer).by_tap["encode"].permutation)


def test_stored_vectors_are_those_of_the_samples(tiny_arguments: list[str], tmp_path: Path) -> None:
    table = np.random.default_rng(0).standard_normal((7, 16, 5)).astype(np.float16)
    np.save(tmp_path / "table.npy", table)
    np.save(tmp_path / "of_images.npy", table[:, 0].astype(np.float32))
    config = load(
        tiny_arguments,
        TapConfig("a", target="stored", source=str(tmp_path / "table.npy"), z_dim=5),
        TapConfig("b", target="stored", source=str(tmp_path / "of_images.npy"), z_dim=5),
    )
    targets = Targets(config, load_tokenizer(config), num_samples=7)
    codes, batch = torch.zeros(3, 16, dtype=torch.int64), {"index": torch.tensor([6, 0, 6])}
    found = targets(targets.taps, codes, batch)
    np.testing.assert_array_equal(found["a"].numpy(), table[[6, 0, 6]])
    np.testing.assert_array_equal(found["b"].numpy(), np.repeat(table[[6, 0, 6], :1], 16, axis=1).astype(np.float32))
    with pytest.raises(InputError, match=r"table\.npy: found 7 rows, expected 8, one for each training sample"):
        Targets(config, load_tokenizer(config), num_samples=8)


def test_faults_are_one_line(tiny_arguments: list[str], encoder: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((4, 15, 3), np.float32))
    tokenizer = load_tokenizer(load(tiny_arguments))
    for tap, message in (
        (TapConfig("a", target="encoders"), "taps: 'a': found target 'encoders', expected codebook, .*mean 'encoder'"),
        (TapConfig("a", z_dim=9), "taps: 'a': found z_dim=9, expected 8, the width of its target"),
        (repa(encoder, z_dim=768), "taps: 'repa': found z_dim=768, expected 64, the width"),
        (repa(encoder, source=None), "taps: 'repa': found no source, expected efficientnet_lite0 or timm:NAME"),
        (repa("timm:none"), "encoder timm:none: expected a model of timm"),
        (TapConfig("a", target="stored"), "taps: 'a': found no source, expected an .npy file"),
        (TapConfig("a", target="stored", source="none.npy"), r"none\.npy: cannot be read as an \.npy file"),
        (TapConfig("a", target="stored", source=str(tmp_path / "x.npy")), r"x\.npy: found float32 \(4, 15, 3\), exp"),
    ):
        with pytest.raises(InputError, match=message):
            Targets(load(tiny_arguments, tap), tokenizer)
    tokenizer.__class__ = type("WithoutGrid", (type(tokenizer),), {"code_shape": (16,)})
    with pytest.raises(InputError, match=r"taps: 'repa': found codes of shape \(16,\) .* expected a square grid"):
        Targets(load(tiny_arguments, repa(encoder)), tokenizer)


def test_taps_that_need_images(tiny_arguments: list[str], encoder: str) -> None:
    assert need_images(load(tiny_arguments, TapConfig("a"), repa(encoder)).model.generator) == ["repa"]
    assert need_images(load(tiny_arguments, repa(encoder, weight=0.0)).model.generator) == []
    off = ("model.generator.transition_alignment=false",)
    assert need_images(load(tiny_arguments, repa(encoder), more=off).model.generator) == []
    assert {name for name, target in TARGETS.items() if target.needs_images} == {"encoder"}
