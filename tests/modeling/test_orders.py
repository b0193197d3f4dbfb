"""Orders in the model and in training: numbers of the published RAR, and of reAR's released code given orders."""

import json
import typing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from modeling.loading import load_generator, load_tokenizer
from modeling.losses import next_token_loss
from modeling.orders import ORDERS, num_order_uniforms, random_order_ratio, random_orders, training_orders
from modeling.perturbation import perturbation_ratio
from modeling.rear import ReAR
from modeling.sampling.cached_decoding import DecodingState, decode_one_token, prefill
from modeling.sampling.generate import guidance_schedule
from modeling.targets.registry import Targets
from modeling.training_step import training_step
from utils.config import load_config
from utils.config_checks import accumulation_steps
from utils.files.weights import load_state_dict
from utils.schema import Config, GeneratorConfig, ModelConfig, SamplingConfig

FIXTURES = Path(__file__).parents[1] / "fixtures"


def published(name: str) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    config = json.loads((FIXTURES / f"{name}.json").read_text())["model"]
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        expected = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "grad_norm_names"}
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), config)), expected


def close(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=0, check_dtype=False)


def check_grad_norms(model: ReAR, name: str, wanted: torch.Tensor) -> None:
    names = [str(parameter) for parameter in np.load(FIXTURES / f"{name}.npz")["grad_norm_names"]]
    parameters = dict(model.named_parameters())
    assert sorted(parameters) == sorted(names)
    actual = torch.stack([parameters[parameter].grad.norm() for parameter in names])
    torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-6, check_dtype=False)


def test_published_rar_weights_load_unchanged_and_give_their_numbers() -> None:
    config, expected = published("rar_tiny")
    model = load_generator(FIXTURES / "rar_tiny.safetensors", config).eval()
    ids, labels, orders = (expected[name] for name in ("ids", "labels", "orders"))
    close(model(ids, labels).logits, expected["logits_raster"][:, :-1])
    close(model(ids, torch.full_like(labels, 10)).logits, expected["logits_raster_null"][:, :-1])
    logits = model(ids, labels, orders).logits
    close(logits, expected["logits_orders"][:, :-1])
    targets = ids.gather(1, orders)
    assert torch.equal(targets, expected["targets_orders"])
    loss = next_token_loss(logits, targets)
    close(loss, expected["loss_orders"])
    close((logits.argmax(-1) == targets).float().mean(), expected["correct_orders"])
    loss.backward()
    check_grad_norms(model, "rar_tiny", expected["grad_norms_orders"])


@pytest.mark.parametrize("order", ["raster", "random"])
def test_cached_decoding_gives_the_published_logits_of_every_step(order: str) -> None:
    config, expected = published("rar_tiny")
    model = load_generator(FIXTURES / "rar_tiny.safetensors", config).eval()
    ids, labels, orders = (expected[name] for name in ("ids", "labels", "orders"))
    cond_logits, uncond_logits = expected["step_cond"], expected["step_null"]
    generator = config.generator
    scales = guidance_schedule(generator.guidance_scale, generator.guidance_scale_pow, 16)
    torch.testing.assert_close(torch.tensor(scales), expected["cfg_per_step"], atol=1e-5, rtol=0)
    with torch.no_grad():
        state = DecodingState(model, 5, guided=True)
        state.start(labels, torch.zeros(ids.shape), orders if order == "random" else None)
        state.codes.copy_(ids if order == "raster" else ids.gather(1, orders))
        if order == "random":
            assert torch.equal(state.codes_in_raster_order(), ids)
            cond_logits = expected["logits_orders"][:, :-1]
            uncond_logits = model(ids, torch.full_like(labels, 10), orders).logits
        state.fill_modulations(0)
        for k in range(16):
            hidden = prefill(state) if k == 0 else decode_one_token(state, end=k + 2, masked=False)
            state.position.add_(1)
            cond, uncond = model.lm_head(hidden).chunk(2)
            close(cond, cond_logits[:, k])
            close(uncond, uncond_logits[:, k])


def test_a_training_step_with_orders_perturbation_and_regularization() -> None:
    """With uniforms that give the perturbation and the orders of the fixture."""
    model_config, expected = published("rar_tiny_regularized")
    config = Config(model=model_config)
    config.training.mixed_precision = "no"
    generator = config.model.generator
    generator.order = "annealed"
    model = ReAR(config.model).eval()
    model.load_state_dict(load_state_dict(FIXTURES / "rar_tiny_regularized.safetensors"), strict=True)
    ids, mask, orders = (expected[name] for name in ("ids", "perturb_mask", "orders"))
    positions = torch.arange(16).expand(5, -1) / 16
    batch = {
        "codes": ids,
        "class_labels": expected["labels"],
        "class_rows": torch.arange(5),
        "perturbation_uniforms": torch.cat(
            [torch.ones(5, 1), 0.9 - 0.9 * mask.float(), (expected["noisy_ids"] + 0.5) / 64], dim=1
        ),
        "order_uniforms": torch.cat([torch.zeros(5, 1), torch.zeros(5, 16).scatter(1, orders, positions)], dim=1),
    }
    assert torch.equal(training_orders(batch["order_uniforms"], 0.1, generator), orders)
    output = model(expected["noisy_ids"], expected["labels"], orders)
    close(output.logits, expected["logits"][:, :-1])
    close(output.projections["encode"], expected["encode_z"][:, 2:])
    close(output.projections["decode"], expected["decode_z"][:, 1:-1])
    tokenizer = SimpleNamespace(codebook_lookup=lambda codes: expected["codebook"][codes], codebook_dim=generator.z_dim)
    terms = training_step(model, tokenizer, batch, 0.5, config, Targets(config, tokenizer), order_ratio=0.1)
    close(terms.metrics["train/ar_loss"], expected["ar_loss"])
    close(terms.metrics["train/correct_tokens"], expected["correct"])
    close(terms.metrics["train/proj_loss"], expected["proj_loss"])
    assert abs(expected["proj_loss"] - expected["proj_loss_if_targets_stay_raster"]) > 0.01
    terms.loss.backward()
    check_grad_norms(model, "rar_tiny_regularized", expected["grad_norms"])
    generator.mask_perturbed_encode = False
    terms = training_step(model, tokenizer, batch, 0.5, config, Targets(config, tokenizer), order_ratio=0.1)
    close(terms.metrics["train/proj_loss"], expected["proj_loss_encode_unmasked"])


def test_raster_as_an_order_gives_the_bits_of_no_order(tiny_model: ReAR) -> None:
    codes, labels = torch.randint(24, (3, 16)), torch.tensor([0, 5, 2])
    raster = torch.arange(16).expand(3, -1)
    of_order, plain = tiny_model(codes, labels, raster), tiny_model(codes, labels)
    assert torch.equal(of_order.logits, plain.logits)
    assert plain.projections.keys() == {"encode", "decode"}
    for name, projection in plain.projections.items():
        assert torch.equal(of_order.projections[name], projection)
    assert not torch.allclose(tiny_model(codes, labels, raster.flip(1)).logits.flip(1), plain.logits, atol=0.1)


@pytest.mark.parametrize("order", ["raster", "annealed"])
def test_at_ratio_0_nothing_is_other_than_in_raster_order(tiny_arguments: list[str], order: str) -> None:
    config = load_config([*tiny_arguments, "experiment.output_dir=unused", f"model.generator.order={order}"])
    torch.manual_seed(0)
    model, tokenizer = ReAR(config.model).eval(), load_tokenizer(config)
    batch = {
        "codes": torch.randint(24, (4, 16)),
        "class_labels": torch.arange(4),
        "perturbation_uniforms": torch.rand(4, 33),
    }
    batch["class_rows"] = torch.arange(4)
    targets = Targets(config, tokenizer)
    losses = [
        training_step(model, tokenizer, batch, 0.5, config, targets),
        training_step(
            model, tokenizer, batch | {"order_uniforms": torch.rand(4, 17)}, 0.5, config, targets, order_ratio=0.0
        ),
    ]
    assert torch.equal(losses[0].loss, losses[1].loss)
    with pytest.raises(KeyError):  # uniforms for orders are drawn only if they are needed
        training_step(model, tokenizer, batch, 0.5, config, targets, order_ratio=0.5)


def test_random_orders_are_permutations_of_equal_probability() -> None:
    orders = random_orders(torch.rand(4000, 4, generator=torch.manual_seed(0)))
    assert torch.equal(orders.sort(dim=1).values, torch.arange(4).expand(4000, -1))
    counts = (orders * torch.tensor([64, 16, 4, 1])).sum(dim=1).bincount()
    counts = counts[counts > 0]
    assert len(counts) == 24
    assert counts.min() > 0.7 * 4000 / 24
    assert random_orders(torch.tensor([[0.5, 0.1, 0.5, 0.1]])).tolist() == [[1, 3, 0, 2]]  # ties: the same everywhere


@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_the_logged_ratio_of_samples_is_not_in_raster_order(ratio: float) -> None:
    generator = GeneratorConfig(order="annealed", image_seq_len=16)
    uniforms = torch.rand(2000, num_order_uniforms(generator), generator=torch.manual_seed(0))
    orders = training_orders(uniforms, ratio, generator)
    others = (orders != torch.arange(16)).any(dim=1)
    assert abs(others.float().mean() - ratio) < 0.03
    assert torch.equal(orders[others], random_orders(uniforms[:, 1:])[others])


def test_the_random_order_ratio_over_the_run() -> None:
    rar = GeneratorConfig(order="annealed")  # the published schedule, of 250,000 steps
    shares = [random_order_ratio(step, rar) for step in (0, 125_000, 156_250, 187_500, 250_000)]
    assert shares == [1, 1, 0.5, 0, 0]
    assert {random_order_ratio(step, GeneratorConfig(order="random")) for step in (0, 200_000)} == {1}
    assert {random_order_ratio(step, GeneratorConfig()) for step in (0, 200_000)} == {0}
    assert num_order_uniforms(GeneratorConfig()) == 0


def test_the_config_names_the_orders_of_the_table() -> None:
    for section in (GeneratorConfig, SamplingConfig):
        choices = typing.get_args(typing.get_type_hints(section)["order"])
        assert choices[0] == "raster"
        assert set(choices[1:]) == set(ORDERS) - ({"annealed"} if section is SamplingConfig else set())


@pytest.mark.parametrize("name", ["rar_b", "rar_l", "rar_xl", "rar_xxl", "rear_rar_b", "rear_rar_l"])
def test_the_shipped_recipes(name: str) -> None:
    path = FIXTURES.parents[1] / f"configs/{name}.yaml"
    config = load_config([f"config={path}"])
    with torch.device("meta"):
        parameters = dict(ReAR(config.model).named_parameters())
    millions = sum(value.numel() for key, value in parameters.items() if "_align_mlp" not in key) / 1e6
    assert float(path.read_text().split(": ")[1].split(" M ")[0].replace(",", "")) == pytest.approx(millions, abs=1)
    training, generator = config.training, config.model.generator
    assert training.per_gpu_batch_size * accumulation_steps(training, world_size=8) * 8 == 2048
    assert random_order_ratio(156_250, generator) == 0.5
    assert perturbation_ratio(0, generator) == name.startswith("rear")
    assert any("_align_mlp" in key for key in parameters) == name.startswith("rear")
    assert config.sampling.order == "raster"
