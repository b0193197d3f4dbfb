"""The arms of configs/studies/rear.yaml on made-up tokens and images."""

from typing import Any

import pytest
import torch
from torch import Tensor

from data.training_batches import with_distinct_labels
from modeling.losses import LossTerms
from modeling.orders import num_order_uniforms, random_order_ratio
from modeling.perturbation import num_perturbation_uniforms, perturbation_ratio
from modeling.rear import ReAR
from modeling.targets.registry import Targets
from modeling.tokenizers.registry import build_tokenizer
from modeling.tokenizers.tokenizer import Tokenizer
from modeling.training_step import training_step
from tests.processes import ROOT
from utils.optim import build_optimizers, set_learning_rate
from utils.schema import Config
from utils.studies.plan import Plan, read_plan

ARMS = ("ar", "noise", "terms", "rear", "permuted", "rar", "rar_rear", "repa")
SEED = 1
TERMS = {  # of each arm, beyond the cross-entropy
    **{arm: {"train/encode_cos", "train/decode_cos"} for arm in ("terms", "rear", "permuted", "rar_rear")},
    "repa": {"train/repa_cos"},
}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return read_plan([f"config={ROOT}/configs/studies/rear.yaml", f"base={ROOT}/configs/rear_fashion.yaml"]
                     + [f"reference={ROOT}/README.md"])[0]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(plan: Plan) -> Tokenizer:
    torch.manual_seed(0)
    return build_tokenizer(plan.configs["ar"].model.vq_model).eval().requires_grad_(False)


def initial_model(config: Config) -> ReAR:
    torch.manual_seed(SEED)
    return ReAR(config.model)


def batch_of(config: Config, size: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    generator = config.model.generator
    widths = {
        "perturbation_uniforms": num_perturbation_uniforms(generator.image_seq_len),
        "order_uniforms": num_order_uniforms(generator),
    }
    batch = {
        "codes": torch.randint(0, 512, (size, 64), generator=random),
        "class_labels": torch.arange(size) % 11,
        "image": torch.rand(size, 3, 32, 32, generator=random),
    }
    return with_distinct_labels(batch | {name: torch.rand(size, n, generator=random) for name, n in widths.items()})


def train(config: Config, tokenizer: Tokenizer, steps: int, size: int) -> list[LossTerms]:
    """Losses of the first steps on one batch; the learning rate is that of a later step, since it starts at 0."""
    config.training.seed = SEED
    model, targets, batch = initial_model(config), Targets(config, tokenizer), batch_of(config, size)
    model.train()
    optimizers = build_optimizers(model, config)
    found = []
    for step in range(steps):
        torch.manual_seed(step)
        terms = training_step(
            model,
            tokenizer,
            batch,
            max_ratio=perturbation_ratio(step, config.model.generator),
            config=config,
            targets=targets,
            order_ratio=random_order_ratio(step, config.model.generator),
            step=step,
        )
        terms.loss.backward()
        set_learning_rate(optimizers, step + config.lr_scheduler.params.warmup_steps, config)
        for optimizer in optimizers.values():
            optimizer.step()
        model.zero_grad()
        found.append(terms)
    return found


def test_the_arms_are_those_of_the_hypotheses(plan: Plan) -> None:
    assert tuple(plan.configs) == ARMS
    pairs = {name: (one.arm, one.baseline) for name, one in plan.file.hypotheses.items()}
    assert pairs == {
        "H1": ("rear", "ar"),
        "H2": ("noise", "ar"),
        "H3": ("terms", "ar"),
        "H4": ("rear", "permuted"),
        "H5": ("rar_rear", "rar"),
    }
    differing: dict[str, Any] = {arm: config.model.generator.perturb_mode for arm, config in plan.configs.items()}
    assert [arm for arm, mode in differing.items() if mode == "none"] == ["ar", "terms", "rar"]


def test_all_arms_start_from_the_same_common_weights(plan: Plan) -> None:
    states = {arm: initial_model(config).state_dict() for arm, config in plan.configs.items()}
    without = states["ar"].keys()
    for arm, state in states.items():
        assert without <= state.keys()
        assert all(torch.equal(states["ar"][key], state[key]) for key in without), arm
    projectors = states["rear"].keys() - without
    for arm in ("terms", "permuted", "rar_rear"):
        assert all(torch.equal(states["rear"][key], states[arm][key]) for key in projectors), arm


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_trains(plan: Plan, tokenizer: Tokenizer, arm: str) -> None:
    found = train(plan.configs[arm], tokenizer, steps=3, size=4)
    assert found[2].loss < found[0].loss
    assert {name for name in found[0].metrics if name.endswith("_cos")} == TERMS.get(arm, set())


def test_the_permuted_codebook_starts_from_the_loss_of_rear(plan: Plan, tokenizer: Tokenizer) -> None:
    rear, permuted = (train(plan.configs[arm], tokenizer, 1, size=32)[0].metrics for arm in ("rear", "permuted"))
    assert rear["train/ar_loss"] == permuted["train/ar_loss"]
    assert rear["train/loss"] != permuted["train/loss"]
    assert abs(rear["train/loss"] - permuted["train/loss"]) < 0.01
