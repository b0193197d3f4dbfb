from typing import get_args

import pytest
import torch

from modeling.rear import ReAR
from utils import optim, schedules
from utils.config import load_config
from utils.optim import OPTIMIZERS, MovingAverage, build_optimizer, set_learning_rate
from utils.schema import OptimizerConfig


def test_the_config_names_the_optimizers_of_the_table() -> None:
    assert set(get_args(OptimizerConfig.__annotations__["name"])) == set(OPTIMIZERS)


def test_matrices_alone_are_decayed(tiny_model: ReAR) -> None:
    config = load_config(["experiment.output_dir=unused", "optimizer.params.beta2=0.9"])
    optimizer = build_optimizer(tiny_model, config)
    assert isinstance(optimizer, torch.optim.AdamW)
    names = {id(parameter): name for name, parameter in tiny_model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert set(decay) == set(names.values())
    assert (decay["lm_head.weight"], decay["blocks.0.attn.qkv.weight"]) == (0.03, 0.03)
    assert (decay["lm_head.bias"], decay["embeddings.weight"], decay["pos_embed"]) == (0, 0, 0)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.9)}


def test_the_moving_average_starts_from_the_weights() -> None:
    model = torch.nn.Linear(3, 2)
    expected = model.weight.detach().clone()
    average = MovingAverage(model, 0.75)
    for step in range(3):
        torch.nn.init.constant_(model.weight, step)
        expected.lerp_(torch.full((2, 3), float(step)), 0.25)
        average.update(model)
    torch.testing.assert_close(average.module.weight, expected, rtol=0, atol=0)
    assert not average.module.training


def test_the_config_chooses_from_both_tables(tiny_model: ReAR, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        optim.OPTIMIZERS, "sgd", lambda groups, params, _: torch.optim.SGD(groups, params.learning_rate)
    )
    monkeypatch.setitem(schedules.SCHEDULES, "steps", lambda step, peak, *_: peak / (1 + step))
    config = load_config(["experiment.output_dir=unused", "optimizer.params.learning_rate=0.5"])
    config.optimizer.name, config.lr_scheduler.scheduler = "sgd", "steps"
    optimizer = build_optimizer(tiny_model, config)
    assert isinstance(optimizer, torch.optim.SGD)
    assert set_learning_rate(optimizer, 4, config) == 0.1
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}
