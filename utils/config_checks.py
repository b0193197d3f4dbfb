"""What the values of a config must fulfil beyond their types: ranges, sizes that follow from others, pairs of keys."""

import math
import os
import re
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from omegaconf import DictConfig, OmegaConf

from utils.errors import InputError
from utils.keys import Key, keys_under
from utils.marks import Follows, Range
from utils.schema import OWN_NUMBER_OF_CODES, Config, GeneratorConfig, OptimizerConfig, TrainingConfig, VQModelConfig


class ConfigError(InputError):
    """What is wrong with a config: the source, the key, the value found and the value expected."""


def check_ranges(config: Config, keys: Sequence[Key]) -> None:
    """
    Raises:
        ConfigError: a number outside its range, infinite or NaN, or an empty list.
    """
    for key in keys:
        _check_range(key, attrgetter(key.name)(config))


def check_generator_ranges(generator: GeneratorConfig) -> None:
    """For a section that was made in Python.

    Raises:
        ConfigError: as `check_ranges`.
    """
    for key in keys_under(["model.generator"]):
        _check_range(key, getattr(generator, key.name.rpartition(".")[2]))


def _check_range(key: Key, value: Any) -> None:
    numbers = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    allowed = key.mark(Range)
    if allowed and not numbers:
        raise ConfigError(f"{key.name}=[]: expected at least one value")
    for number in numbers:
        if isinstance(number, float) and not math.isfinite(number):
            raise ConfigError(f"{key.name}={value}: expected a finite number")
        if allowed and number is not None and number not in allowed:
            raise ConfigError(f"{key.name}={value}: expected {allowed}")


def check_agreement(merged: DictConfig, keys: Sequence[Key]) -> None:
    """
    Raises:
        ConfigError: a value that follows from others is given and is another one.
    """
    derived, kind = merged.copy(), OmegaConf.select(merged, "model.vq_model.model_type")
    for key in keys:
        follows = key.mark(Follows)
        if follows and follows.must_agree and kind not in follows.free_for:
            found = OmegaConf.select(merged, key.name)
            OmegaConf.update(derived, key.name, str(follows))
            expected = OmegaConf.select(derived, key.name)
            OmegaConf.update(derived, key.name, found)
            if found != expected:
                raise ConfigError(f"{key.name}={found}: expected {follows.source}={expected}")


def check_fields(config: Config) -> None:
    """
    Raises:
        ConfigError: keys that do not fit together.
    """
    _check_vq_model(config.model.vq_model)
    _check_generator(config.model.generator)
    _check_param_groups(config.optimizer)
    profiled_steps(config.training)
    if config.sampling.order != "raster" and config.model.generator.order == "raster":
        raise ConfigError(
            f"sampling.order={config.sampling.order}: expected raster, as model.generator.order=raster: the model was "
            "trained in no other one"
        )
    experiment = config.experiment
    if experiment.init_from is not None and experiment.resume not in ("auto", "true", "false"):
        raise ConfigError(
            f"experiment.init_from={experiment.init_from}: expected no path in experiment.resume beside it"
        )


def _check_vq_model(vq_model: VQModelConfig) -> None:
    factor = 2 ** (len(vq_model.channel_mult) - 1)
    if vq_model.resolution % factor and vq_model.model_type not in OWN_NUMBER_OF_CODES:
        raise ConfigError(
            f"model.vq_model.resolution={vq_model.resolution}: expected a multiple of {factor} "
            f"({len(vq_model.channel_mult)} levels in channel_mult)"
        )


def _check_generator(generator: GeneratorConfig) -> None:
    if generator.hidden_size % generator.num_attention_heads:
        raise ConfigError(
            f"model.generator.hidden_size={generator.hidden_size}: expected a multiple of "
            f"num_attention_heads={generator.num_attention_heads}"
        )
    for name in ("encode", "decode"):
        layer = getattr(generator, f"{name}_align_layer_idx")
        used = generator.transition_alignment and getattr(generator, f"{name}_align")
        if used and layer >= generator.num_hidden_layers:
            raise ConfigError(
                f"model.generator.{name}_align_layer_idx={layer}: expected 0 to {generator.num_hidden_layers - 1} "
                f"(num_hidden_layers={generator.num_hidden_layers})"
            )


def _check_param_groups(optimizer: OptimizerConfig) -> None:
    for index, group in enumerate(optimizer.param_groups):
        where = f"optimizer.param_groups[{index}]"
        try:
            re.compile(group.pattern)
        except re.error as error:
            raise ConfigError(f"{where}.pattern={group.pattern}: expected a regular expression: {error}") from error
        for name in ("lr_factor", "weight_decay"):
            value = getattr(group, name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"{where}.{name}={value}: expected a finite number of at least 0")


def check_training(config: Config) -> None:
    """For the script that trains reAR.

    Raises:
        ConfigError: a batch that does not divide among the processes of this launch, keys that exclude each other, or
            one that needs another.
    """
    training = config.training
    accumulation_steps(training, int(os.environ.get("WORLD_SIZE", 1)))
    samples = config.experiment.eval_samples
    if samples == 1:
        raise ConfigError("experiment.eval_samples=1: expected 0 or at least 2")
    if samples and config.experiment.eval_every == 0:
        raise ConfigError(f"experiment.eval_samples={samples}: expected experiment.eval_every above 0")
    if samples and config.dataset.params.eval_shards_path_or_url is None:
        raise ConfigError(
            f"experiment.eval_samples={samples}: expected images to compare with in "
            "dataset.params.eval_shards_path_or_url"
        )
    if training.fsdp and training.compile == "on":
        raise ConfigError(
            "training.compile=on: expected auto or off, as training.fsdp=true: sharded, nothing is compiled"
        )
    if training.stop_steps is not None and training.stop_steps > training.max_train_steps:
        raise ConfigError(
            f"training.stop_steps={training.stop_steps}: expected at most max_train_steps={training.max_train_steps}"
        )


def profiled_steps(training: TrainingConfig) -> range:
    """Numbers of the steps of `training.profile`, from 0; empty: none.

    Raises:
        ConfigError: it is no range.
    """
    start, _, stop = (training.profile or "0:0").partition(":")
    steps = range(int(start), int(stop)) if start.isdecimal() and stop.isdecimal() else range(0)
    if training.profile is not None and not steps:
        raise ConfigError(f"training.profile={training.profile}: expected START:STOP, two numbers of steps, as 100:103")
    return steps


def accumulation_steps(training: TrainingConfig, world_size: int) -> int:
    """Micro-batches per optimizer step on each of `world_size` processes.

    Raises:
        ConfigError: `training.global_batch_size` is not a multiple of what the processes take at once, or contradicts
            `training.gradient_accumulation_steps`.
    """
    total, per_gpu, given = (
        training.global_batch_size,
        training.per_gpu_batch_size,
        training.gradient_accumulation_steps,
    )
    if total is None:
        return given
    steps, rest = divmod(total, per_gpu * world_size)
    if rest or not steps:
        raise ConfigError(
            f"training.global_batch_size={total}: expected a multiple of {per_gpu * world_size} = "
            f"per_gpu_batch_size={per_gpu} * {world_size} processes"
        )
    if given not in (1, steps):
        raise ConfigError(
            f"training.gradient_accumulation_steps={given}: expected {steps} for global_batch_size={total}, "
            f"per_gpu_batch_size={per_gpu} and {world_size} processes; leave it out"
        )
    return steps
