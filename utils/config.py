"""Configuration: schema defaults < YAML file of `config=` < `key=value` arguments.

Print the resolved config of a command line without running it:

    python -m utils.config config=configs/rear_b.yaml training.seed=1
"""

import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils.errors import InputError
from utils.schema import Config, TrainingConfig

# Keys of published YAML files that nothing reads, there or here: accepted with a notice.
IGNORED_KEYS = {"eval_every", "kv_cache", "finetune_decoder", "pretrained_tokenizer_weight"}


class ConfigError(InputError):
    """What is wrong with a config, in one line: the source, the key, the value found and the value expected."""


def load_config(argv: list[str]) -> Config:
    """Build the config of a command line such as `["config=configs/rear_b.yaml", "training.seed=1"]`.

    Raises:
        ConfigError: a missing file, a key that is unknown, duplicate or missing, a value of the wrong type, or
            values that contradict each other.
    """
    merged = OmegaConf.structured(Config)
    paths, overrides = _split_arguments(argv)
    for path in paths:
        merged = _merge(merged, _read_yaml(path), str(path))
    merged = _merge(merged, _parse_overrides(overrides), "command line")
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"{missing[0]}: missing value; give it in the YAML file or as {missing[0]}=...")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from error
    _normalize(config)
    _check_values(config)
    return config


def load_config_or_exit(*checks: Callable[[Config], None]) -> Config:
    """`load_config` of the command line and further checks; a ConfigError becomes one line and exit status 2."""
    try:
        config = load_config(sys.argv[1:])
        for check in checks:
            check(config)
        return config
    except ConfigError as error:
        print(f"config error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML; `config=<path>` reads it back."""
    path.write_text(to_yaml(config))


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _split_arguments(argv: list[str]) -> tuple[list[Path], list[str]]:
    paths, overrides = [], []
    for argument in argv:
        key, separator, value = argument.partition("=")
        if not separator or not key:
            raise ConfigError(f"command line: {argument!r} is not of the form key=value")
        if key == "config":
            paths.append(Path(value))
        else:
            overrides.append(argument)
    if len(paths) > 1:
        raise ConfigError(f"command line: config= is given {len(paths)} times, expected once")
    return paths, overrides


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        found = [str(p) for p in sorted({*path.parent.glob("*.yaml"), *Path("configs").glob("*.yaml")})]
        raise ConfigError(f"config={path}: no such file{_did_you_mean(str(path), found)}")
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or _first_line(error)
        raise ConfigError(f"{path}{f', line {mark.line + 1}' if mark else ''}: {problem}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: expected a mapping of sections, found a {type(loaded).__name__}")
    return loaded


def _parse_overrides(overrides: list[str]) -> DictConfig:
    try:
        return OmegaConf.from_dotlist(overrides)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"command line: {_first_line(error)}") from error


def _merge(base: DictConfig, update: DictConfig, source: str) -> DictConfig:
    _drop_ignored_keys(update, source)
    known = _flat_keys(base)
    for key in _flat_keys(update):
        if any(name.startswith(f"{key}.") for name in known):
            raise ConfigError(f"{source}: {key} is a section of keys, found {OmegaConf.select(update, key)!r}")
        if key not in known:
            raise ConfigError(f"{source}: unknown key {key!r}{_did_you_mean(key, known)}")
    try:
        return OmegaConf.merge(base, update)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {error.full_key or ''}: {_first_line(error)}") from error


def _drop_ignored_keys(node: DictConfig, source: str) -> None:
    for key in list(node):
        if key in IGNORED_KEYS:
            print(f"{source}: {node._get_full_key(key)} has no effect and is ignored", file=sys.stderr)
            node.pop(key)
        elif OmegaConf.is_dict(node._get_node(key)):
            _drop_ignored_keys(node[key], source)


def _flat_keys(node: DictConfig) -> list[str]:
    keys = []
    for key in node:
        child = node._get_node(key)
        is_section = OmegaConf.is_dict(child) and not child._is_none()
        keys += [f"{key}.{inner}" for inner in _flat_keys(child)] if is_section else [str(key)]
    return keys


def _did_you_mean(word: str, known: list[str]) -> str:
    """The nearest known name, compared as a whole and by the last part alone (a key in the wrong section)."""
    leaf = word.rsplit(".", 1)[-1]
    leaves = {name.rsplit(".", 1)[-1]: name for name in known}
    near = (
        difflib.get_close_matches(word, known, 1, 0.8)
        or [leaves[match] for match in difflib.get_close_matches(leaf, leaves, 1, 0.6)]
        or difflib.get_close_matches(word, known, 1, 0.3)
    )
    return f"; did you mean {near[0]!r}?" if near else ""


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _normalize(config: Config) -> None:
    """Undo YAML 1.1, which reads a bare `no`, `on` or `true` as a boolean where a word is meant."""
    for section in (config.training, config.sampling):
        if section.mixed_precision == "False":
            section.mixed_precision = "no"
    config.sampling.compile = {"True": "on", "False": "off"}.get(config.sampling.compile, config.sampling.compile)
    if config.experiment.resume.lower() in ("auto", "true", "false"):  # else a path
        config.experiment.resume = config.experiment.resume.lower()


def _check_values(config: Config) -> None:
    generator, vq_model = config.model.generator, config.model.vq_model
    choices = {
        "dataset.params.on_bad_sample": (config.dataset.params.on_bad_sample, ("error", "skip")),
        "training.mixed_precision": (config.training.mixed_precision, ("bf16", "no")),
        "model.generator.perturb_mode": (generator.perturb_mode, ("switch", "mask", "none")),
        "model.vq_model.model_type": (vq_model.model_type, ("maskgit_vq",)),
        "optimizer.name": (config.optimizer.name, ("adamw",)),
        "lr_scheduler.scheduler": (config.lr_scheduler.scheduler, ("cosine",)),
        "dataset.preprocessing.pretokenize_crops": (
            config.dataset.preprocessing.pretokenize_crops,
            ("center", "center_flip", "ten_crop"),
        ),
        "sampling.uint8_rule": (config.sampling.uint8_rule, ("truncate", "round")),
        "sampling.compile": (config.sampling.compile, ("auto", "on", "off")),
        "sampling.mixed_precision": (config.sampling.mixed_precision, ("auto", "bf16", "no")),
    }
    for key, (value, allowed) in choices.items():
        if value not in allowed:
            raise ConfigError(f"{key}={value}: expected one of {', '.join(allowed)}{_did_you_mean(value, [*allowed])}")
    for key, value, least in _lower_bounds(config):
        if value < least:
            raise ConfigError(f"{key}={value}: expected at least {least}")
    if generator.hidden_size % generator.num_attention_heads:
        raise ConfigError(
            f"model.generator.hidden_size={generator.hidden_size}: expected a multiple of "
            f"num_attention_heads={generator.num_attention_heads}"
        )
    for name in ("encode", "decode"):
        layer = getattr(generator, f"{name}_align_layer_idx")
        used = generator.transition_alignment and getattr(generator, f"{name}_align")
        if used and not 0 <= layer < generator.num_hidden_layers:
            raise ConfigError(
                f"model.generator.{name}_align_layer_idx={layer}: expected 0 to {generator.num_hidden_layers - 1} "
                f"(num_hidden_layers={generator.num_hidden_layers})"
            )
    experiment = config.experiment
    if experiment.init_from is not None and experiment.resume not in ("auto", "true", "false"):
        raise ConfigError(
            f"experiment.init_from={experiment.init_from}: expected no path in experiment.resume beside it"
        )
    peak, scheduled = config.optimizer.params.learning_rate, config.lr_scheduler.params.learning_rate
    if peak != scheduled:
        raise ConfigError(f"lr_scheduler.params.learning_rate={scheduled}: expected the optimizer's, {peak}")


def _lower_bounds(config: Config) -> list[tuple[str, float, float]]:
    bounds = {
        "experiment": {"save_every": 1, "keep_last": 2, "generate_every": 1, "log_every": 1, "log_grad_norm_every": 1}
        | {"keep_every": 0, "max_save_failures": 1},
        "training": {"gradient_accumulation_steps": 1, "per_gpu_batch_size": 1, "max_train_steps": 0}
        | {"max_nonfinite_steps": 1, "launch_timeout": 1, "process_group_timeout": 1},
        "dataset.params": {"max_bad_fraction": 0},
        "inspection": {"num_images": 1},
        "vq_training": {"revive_every": 1, "adversarial_weight": 0},
        "sampling": {"num_fid_samples": 1, "per_gpu_batch_size": 1},
        "model.generator": {"condition_num_classes": 1, "image_seq_len": 1, "num_hidden_layers": 1, "top_k": 0},
    }
    rows = []
    for section, keys in bounds.items():
        node = config
        for part in section.split("."):
            node = getattr(node, part)
        rows += [(f"{section}.{key}", getattr(node, key), least) for key, least in keys.items()]
    return rows


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


def check_global_batch(config: Config) -> None:
    """For scripts that train: the batch must divide among the processes of this launch."""
    accumulation_steps(config.training, int(os.environ.get("WORLD_SIZE", 1)))
    if config.training.fsdp and config.training.use_ema:
        raise ConfigError("training.fsdp=true: expected training.use_ema=false; the EMA is not sharded")


def check_tokenizer_fits(config: Config) -> None:
    """Check that generator and tokenizer agree: for scripts that use both.

    Raises:
        ConfigError: the two sections name different numbers of codes or embedding widths.
    """
    vq_model, generator = config.model.vq_model, config.model.generator
    grid = vq_model.resolution // 2 ** (len(vq_model.channel_mult) - 1)
    if vq_model.num_latent_tokens != grid**2:
        raise ConfigError(
            f"model.vq_model.num_latent_tokens={vq_model.num_latent_tokens}: expected {grid**2} for "
            f"resolution={vq_model.resolution} and {len(vq_model.channel_mult)} levels"
        )
    if generator.image_seq_len != vq_model.num_latent_tokens:
        raise ConfigError(
            f"model.generator.image_seq_len={generator.image_seq_len}: expected the tokenizer's "
            f"num_latent_tokens={vq_model.num_latent_tokens}"
        )
    if generator.transition_alignment and generator.z_dim != vq_model.token_size:
        raise ConfigError(
            f"model.generator.z_dim={generator.z_dim}: expected the tokenizer's token_size={vq_model.token_size}"
        )


if __name__ == "__main__":
    print(to_yaml(load_config_or_exit()), end="")
