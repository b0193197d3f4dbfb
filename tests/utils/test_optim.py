import copy
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from modeling.rear import ReAR
from utils import optim, schedules
from utils.config import load_config
from utils.errors import InputError
from utils.optim import (
    OPTIMIZERS,
    MovingAverage,
    Optimizers,
    build_optimizers,
    describe_optimizers,
    param_groups,
    set_learning_rate,
)
from utils.run.checkpoint import Resumable, load_modules, load_optimizers, take_snapshot, write_checkpoint
from utils.run.manifest import Provenance, TrainingState
from utils.schema import Config, OptimizerConfig

HAS_MUON = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
GROUPS = (
    "optimizer.param_groups=[{pattern: '^embeddings|pos_embed', lr_factor: 0.5, weight_decay: 0.1}, "
    "{pattern: embed, lr_factor: 2}, {pattern: 'blocks\\.1\\.', lr_factor: 0.25}]"
)


def config_of(*arguments: str) -> Config:
    return load_config(["experiment.output_dir=unused", *arguments])


def settings_by_name(model: nn.Module, optimizers: Optimizers, setting: str) -> dict[str, Any]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [group for optimizer in optimizers.values() for group in optimizer.param_groups]
    by_name = {names[id(parameter)]: group[setting] for group in groups for parameter in group["params"]}
    assert len(by_name) == sum(len(group["params"]) for group in groups)  # each parameter is updated once
    assert set(by_name) == set(names.values())
    return by_name


def test_the_config_names_the_optimizers_of_the_table() -> None:
    assert set(get_args(OptimizerConfig.__annotations__["name"])) == set(OPTIMIZERS)


def test_matrices_alone_are_decayed(tiny_model: ReAR) -> None:
    optimizers = build_optimizers(tiny_model, config_of("optimizer.params.beta2=0.9"))
    assert list(optimizers) == ["optimizer"]
    assert isinstance(optimizers["optimizer"], torch.optim.AdamW)
    decay = settings_by_name(tiny_model, optimizers, "weight_decay")
    assert (decay["lm_head.weight"], decay["blocks.0.attn.qkv.weight"]) == (0.03, 0.03)
    assert (decay["lm_head.bias"], decay["embeddings.weight"], decay["pos_embed"]) == (0, 0, 0)
    assert set(settings_by_name(tiny_model, optimizers, "lr_factor").values()) == {1}
    assert {group["betas"] for group in optimizers["optimizer"].param_groups} == {(0.9, 0.9)}


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=HAS_MUON)])
def test_the_first_pattern_found_in_a_name_sets_rate_and_decay(tiny_model: ReAR, name: str) -> None:
    config = config_of(GROUPS, f"optimizer.name={name}", "optimizer.params.learning_rate=0.5")
    optimizers = build_optimizers(tiny_model, config)
    factor = settings_by_name(tiny_model, optimizers, "lr_factor")
    assert (factor["embeddings.weight"], factor["target_aware_pos_embed"]) == (0.5, 0.5)
    assert (factor["timesteps_embeddings"], factor["blocks.1.mlp.fc1.weight"]) == (2, 0.25)
    assert (factor["blocks.0.mlp.fc1.weight"], factor["lm_head.weight"]) == (1, 1)
    decay = settings_by_name(tiny_model, optimizers, "weight_decay")
    assert (decay["embeddings.weight"], decay["timesteps_embeddings"]) == (0.1, 0)
    assert (decay["blocks.1.mlp.fc1.weight"], decay["blocks.1.mlp.fc1.bias"]) == (0.03, 0)
    lr = set_learning_rate(optimizers, 100, config)
    assert 0 < lr < 0.5
    assert settings_by_name(tiny_model, optimizers, "lr") == {key: lr * value for key, value in factor.items()}


def test_groups_from_a_yaml_file_are_those_of_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "groups.yaml").write_text(
        "optimizer:\n  param_groups:\n  - {pattern: '^embeddings|pos_embed', lr_factor: 0.5, weight_decay: 0.1}\n"
        "  - pattern: embed\n    lr_factor: 2\n  - {pattern: 'blocks\\.1\\.', lr_factor: 0.25, weight_decay: null}\n"
    )
    assert config_of(GROUPS) == config_of(f"config={tmp_path / 'groups.yaml'}")
    assert [group.lr_factor for group in config_of(GROUPS).optimizer.param_groups] == [0.5, 2, 0.25]


@pytest.mark.parametrize(
    "groups",
    [
        "{pattern: '('}",
        "{pattern: x, lr_factor: -1}",
        "{pattern: x, weight_decay: nan}",
        "{pattern: x, lr_factor: fast}",
        "{pattern: x, factor: 1}",
        "{lr_factor: 1}",
        "x",
    ],
)
def test_a_wrong_group_is_a_config_error_of_one_line(groups: str) -> None:
    with pytest.raises(InputError, match=r"optimizer\.param_groups") as error:
        config_of(f"optimizer.param_groups=[{groups}]")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pattern", ["lm_haed", "pos_embed"])
def test_a_pattern_without_effect_is_an_error(tiny_model: ReAR, pattern: str) -> None:
    groups = f"optimizer.param_groups=[{{pattern: embed, lr_factor: 2}}, {{pattern: {pattern}, lr_factor: 3}}]"
    with pytest.raises(InputError, match=rf"optimizer\.param_groups: .*{pattern}"):
        build_optimizers(tiny_model, config_of(groups))


def test_the_log_line_has_each_group(tiny_model: ReAR) -> None:
    optimizers = build_optimizers(tiny_model, config_of("optimizer.param_groups=[{pattern: lm_head, lr_factor: 0.5}]"))
    line = describe_optimizers(optimizers)
    assert line.count("AdamW of ") == 4  # with and without decay, each in the pattern and out of it
    assert line.count("AdamW of 1 tensors") == 2
    assert line.count("lr_factor=0.5") == 2


@HAS_MUON
def test_muon_updates_the_matrices_of_the_blocks_and_adamw_the_rest(tiny_model: ReAR) -> None:
    config = config_of("optimizer.name=muon", "optimizer.params.momentum=0.8", "optimizer.params.learning_rate=0.5")
    optimizers = build_optimizers(tiny_model, config)
    settings_by_name(tiny_model, optimizers, "lr")  # every parameter, once
    names = {id(parameter): name for name, parameter in tiny_model.named_parameters()}
    (group,) = optimizers["muon"].param_groups
    of_block = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"}
    expected = {f"blocks.{block}.{layer}.weight" for block in (0, 1) for layer in of_block}
    assert {names[id(parameter)] for parameter in group["params"]} == expected
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.8, 0.03, True)

    # The update has the root mean square of AdamW's: about 0.2 times the learning rate, for every shape.
    for parameter in tiny_model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for parameter in group["params"]:
        before = parameter.detach().clone()
        group["weight_decay"] = 0
        optimizers["muon"].step()
        assert (parameter.detach() - before).square().mean().sqrt().item() == pytest.approx(0.1, rel=0.2)


def test_a_torch_or_a_model_without_muon_is_one_line(tiny_model: ReAR, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("optimizer.name=muon")
    no_blocks = nn.Linear(3, 2)
    no_blocks.no_weight_decay = set  # type: ignore[assignment]
    if hasattr(torch.optim, "Muon"):
        with pytest.raises(InputError, match=r"optimizer\.name=muon: found no matrices"):
            build_optimizers(no_blocks, config)
        monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(InputError, match=r"optimizer\.name=muon: found torch .*, expected 2\.9"):
        build_optimizers(tiny_model, config)


def updated(model: ReAR, optimizers: Optimizers, config: Config, steps: range) -> None:
    for step in steps:
        set_learning_rate(optimizers, step, config)
        torch.manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        for optimizer in optimizers.values():
            optimizer.step()


def resumable(model: ReAR, optimizers: Optimizers) -> Resumable:
    return Resumable({"model": model}, {name: (model, optimizer) for name, optimizer in optimizers.items()})


@pytest.mark.parametrize("regrouped", [False, True])
@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=HAS_MUON)])
def test_resumed_updates_are_the_uninterrupted_ones(
    tiny_model: ReAR, tmp_path: Path, name: str, regrouped: bool
) -> None:
    """Also when the parameters are divided into other groups than in the checkpoint."""
    config = config_of(f"optimizer.name={name}", "lr_scheduler.params.warmup_steps=2", GROUPS)
    first = config_of(f"optimizer.name={name}", "lr_scheduler.params.warmup_steps=2") if regrouped else config
    resumed = copy.deepcopy(tiny_model)
    before = build_optimizers(tiny_model, first)
    updated(tiny_model, before, first, range(3))
    snapshot = take_snapshot(resumable(tiny_model, before))
    write_checkpoint(tmp_path, TrainingState(3, 8, 24), Provenance(), snapshot)
    after = build_optimizers(tiny_model, config)
    for optimizer_before, optimizer in zip(before.values(), after.values(), strict=True):
        optimizer.state = optimizer_before.state
    updated(tiny_model, after, config, range(3, 6))

    optimizers = build_optimizers(resumed, config)
    load_modules(tmp_path / "checkpoint-3", resumable(resumed, optimizers))
    load_optimizers(tmp_path / "checkpoint-3", resumable(resumed, optimizers))
    updated(resumed, optimizers, config, range(3, 6))
    ours, theirs = resumed.state_dict(), tiny_model.state_dict()
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


def test_the_moving_average_starts_from_the_weights() -> None:
    model = nn.Linear(3, 2)
    expected = model.weight.detach().clone()
    average = MovingAverage(model, 0.15)
    for step, decay in enumerate([1 / 10, 0.15, 0.15]):  # rises as (1 + n) / (10 + n)
        nn.init.constant_(model.weight, step)
        expected.lerp_(torch.full((2, 3), float(step)), 1 - decay)
        average.update(model, age=step)
    torch.testing.assert_close(average.module.weight, expected, rtol=0, atol=0)
    assert not average.module.training


def test_the_config_chooses_from_both_tables(tiny_model: ReAR, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        optim.OPTIMIZERS,
        "sgd",
        lambda parameters, params: {"optimizer": torch.optim.SGD(param_groups(parameters), params.learning_rate)},
    )
    monkeypatch.setitem(schedules.SCHEDULES, "steps", lambda step, peak, **_: peak / (1 + step))
    config = config_of("optimizer.params.learning_rate=0.5")
    config.optimizer.name, config.lr_scheduler.scheduler = "sgd", "steps"
    optimizers = build_optimizers(tiny_model, config)
    assert isinstance(optimizers["optimizer"], torch.optim.SGD)
    assert set_learning_rate(optimizers, 4, config) == 0.1
    assert set(settings_by_name(tiny_model, optimizers, "lr").values()) == {0.1}
