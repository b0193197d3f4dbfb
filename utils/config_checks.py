"""Checks of a config beyond the types of its values: ranges, derived sizes, keys that do not fit together."""

import re
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

from utils.keys import ConfigError, Key, keys_of
from utils.launch_variables import launch_environment
from utils.schema import GRID, OWN_NUMBER_OF_CODES, Config, GeneratorConfig, TrainingConfig


def check_ranges(section: Any, prefix: str = "") -> None:
    """
    Args:
        section: a config, or a section of one that was made in Python.
        prefix: prefix of the section's keys, for the error message, such as "model.generator.".

    Raises:
        ConfigError: a value of a different type or outside its range.
    """
    for name, key in keys_of(type(section)).items():
        try:
            key.read(attrgetter(name)(section))
        except ConfigError as error:
            raise ConfigError(f"{prefix}{error}") from error


def codes_per_image(resolution: int, channel_mult: Sequence[int]) -> int:
    """The formula GRID."""
    return (2 * resolution // 2 ** len(channel_mult)) ** 2


def check_agreement(config: Config, keys: Iterable[Key]) -> None:
    """
    Raises:
        ConfigError: a given value differs from the one that it must equal.
    """
    for key in keys:
        is_free = key.equals == GRID and config.model.vq_model.model_type in OWN_NUMBER_OF_CODES
        if key.equals and not is_free:
            found = attrgetter(key.name)(config)
            if key.equals == GRID:
                expected = codes_per_image(config.model.vq_model.resolution, config.model.vq_model.channel_mult)
            else:
                expected = attrgetter(key.equals)(config)
            _require(found == expected, f"{key.name}={found}: expected {key.equals}={expected}")


def check_combinations(config: Config) -> None:
    """
    Raises:
        ConfigError: keys that do not fit together.
    """
    vq_model, generator, experiment = config.model.vq_model, config.model.generator, config.experiment
    levels = len(vq_model.channel_mult)
    _require(
        vq_model.resolution % 2 ** (levels - 1) == 0 or vq_model.model_type in OWN_NUMBER_OF_CODES,
        f"model.vq_model.resolution={vq_model.resolution}: expected a multiple of {2 ** (levels - 1)} ({levels} levels "
        "in channel_mult)",
    )
    _require(
        generator.hidden_size % generator.num_attention_heads == 0,
        f"model.generator.hidden_size={generator.hidden_size}: expected a multiple of "
        f"num_attention_heads={generator.num_attention_heads}",
    )
    for name in ("encode", "decode"):
        layer = getattr(generator, f"{name}_align_layer_idx")
        is_used = generator.transition_alignment and getattr(generator, f"{name}_align")
        _require(
            layer < generator.num_hidden_layers or not is_used,
            f"model.generator.{name}_align_layer_idx={layer}: expected 0 to {generator.num_hidden_layers - 1} "
            f"(num_hidden_layers={generator.num_hidden_layers})",
        )
    _check_taps(generator)
    _require(
        config.sampling.order == "raster" or generator.order != "raster",
        f"sampling.order={config.sampling.order}: expected raster, since the model is trained with "
        "model.generator.order=raster",
    )
    _require(
        experiment.init_from is None or experiment.resume in ("auto", "true", "false"),
        f"experiment.init_from={experiment.init_from}: expected null, since experiment.resume is a path",
    )
    for group in config.optimizer.param_groups:
        try:
            re.compile(group.pattern)
        except re.error as error:
            raise ConfigError(
                f"optimizer.param_groups: pattern {group.pattern!r}: expected a regular expression: {error}"
            ) from error
    profiled_steps(config.training)


def check_schedules(config: Config) -> None:
    """Check, in scripts that train, that every schedule in use begins before it ends and the learning rate falls. (A
    schedule that ends after the run is a warning: `utils.schedules.schedule_warnings`.)

    Raises:
        ConfigError: keys that do not fit together.
    """
    generator, training = config.model.generator, config.training
    bounds = [("lr_scheduler.params.end_lr", "optimizer.params.learning_rate")]
    if generator.perturb_mode != "none":
        bounds.append(("model.generator.randomness_anneal_start", "model.generator.randomness_anneal_end"))
    if generator.order == "annealed":
        bounds.append(("model.generator.order_anneal_start", "model.generator.order_anneal_end"))
    if training.stop_steps is not None:
        bounds.append(("training.stop_steps", "training.max_train_steps"))
    for name, bound_name in bounds:
        value, bound = attrgetter(name)(config), attrgetter(bound_name)(config)
        _require(value <= bound, f"{name}={value}: expected at most {bound_name}={bound}; change either")


def _check_taps(generator: GeneratorConfig) -> None:
    names = ["encode", "decode"]
    for tap in generator.taps:
        key = f"model.generator.taps: name {tap.name!r}"
        _require(re.fullmatch("[a-z][a-z0-9_]*", tap.name) is not None, f"{key}: expected letters a to z, digits and _")
        _require(tap.name not in names, f"{key}: expected a name that no other tap has (encode and decode have theirs)")
        names.append(tap.name)
        _require(
            tap.layer < generator.num_hidden_layers,
            f"{key}: layer {tap.layer}: expected 0 to {generator.num_hidden_layers - 1} "
            f"(num_hidden_layers={generator.num_hidden_layers})",
        )


def check_training(config: Config) -> None:
    """Checks of the script that trains reAR.

    Raises:
        ConfigError: a batch that does not divide among the processes of this launch, or keys that do not fit together.
    """
    check_schedules(config)
    training, experiment = config.training, config.experiment
    accumulation_steps(training, world_size=launch_environment()[1])
    samples = experiment.eval_samples
    _require(samples != 1, "experiment.eval_samples=1: expected 0 or at least 2")
    _require(
        samples == 0 or experiment.eval_every > 0,
        f"experiment.eval_samples={samples}: expected experiment.eval_every above 0",
    )
    _require(
        samples == 0 or config.dataset.params.eval_shards_path_or_url is not None,
        f"experiment.eval_samples={samples}: expected images in dataset.params.eval_shards_path_or_url",
    )
    _require(
        not training.fsdp or training.compile != "on",
        "training.compile=on: expected auto or off with training.fsdp=true, which does not compile",
    )


def profiled_steps(training: TrainingConfig) -> range:
    """Steps of `training.profile`, from 0; empty: none.

    Raises:
        ConfigError: it is not of the form START:STOP.
    """
    if training.profile is None:
        return range(0)
    start, _, stop = training.profile.partition(":")
    steps = range(int(start), int(stop)) if start.isdecimal() and stop.isdecimal() else range(0)
    _require(len(steps) > 0, f"training.profile={training.profile}: expected START:STOP, such as 100:103")
    return steps


def accumulation_steps(training: TrainingConfig, world_size: int) -> int:
    """Micro-batches per optimizer step on each of `world_size` processes.

    Raises:
        ConfigError: `training.global_batch_size` does not divide among the processes, or contradicts
            `training.gradient_accumulation_steps`.
    """
    total, given = training.global_batch_size, training.gradient_accumulation_steps
    if total is None:
        return given
    steps, rest = divmod(total, training.per_gpu_batch_size * world_size)
    _require(
        rest == 0 and steps > 0,
        f"training.global_batch_size={total}: expected a multiple of {training.per_gpu_batch_size * world_size} = "
        f"per_gpu_batch_size={training.per_gpu_batch_size} * {world_size} processes",
    )
    _require(
        given in (1, steps),
        f"training.gradient_accumulation_steps={given}: expected {steps} for global_batch_size={total}, "
        f"per_gpu_batch_size={training.per_gpu_batch_size} and {world_size} processes; leave it out",
    )
    return steps


def _require(is_right: bool, message: str) -> None:
    if not is_right:
        raise ConfigError(message)
