"""Configuration: schema defaults < YAML file of `config=` < `key=value` arguments.

python -m utils.config --keys                                       every key, its default, range and meaning
python -m utils.config config=configs/rear_b.yaml training.seed=1   the resolved config, without running anything
"""

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from utils.config_checks import ConfigError, check_agreement, check_fields, check_ranges
from utils.errors import input_errors_exit
from utils.files.atomic import write_text
from utils.keys import KEYS, format_keys, keys_under
from utils.marks import Follows
from utils.schema import Config

ROOT = Path(__file__).resolve().parents[1]
# Keys of published YAML files that nothing reads, there or here: accepted with a notice.
IGNORED_KEYS = {"log_grad_norm_every", "kv_cache", "finetune_decoder", "pretrained_tokenizer_weight"}
# Of VQGAN+ and TiTok, in this section only: their training, and what the weights tell.
IGNORED_VQ_KEYS = {"commitment_cost", "entropy_loss_weight", "entropy_loss_temperature", "entropy_gamma"}
IGNORED_VQ_KEYS |= {"num_channels", "num_resolutions", "sample_with_conv"}
IGNORED_KEYS |= {f"model.vq_model.{name}" for name in IGNORED_VQ_KEYS}
PUBLISHED_FOLDER = ("configs", "training", "generator")
NOT_TEXT = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("bool", "float", "int", "timestamp"))  # of YAML values
YAML_BOOLEANS = (("true", "on", "yes"), ("false", "off", "no"))  # words that YAML 1.1 takes for the same boolean

OmegaConf.register_resolver(
    "codes_per_image", lambda resolution, levels: (2 * resolution // 2 ** len(levels)) ** 2, replace=True
)


def load_config(argv: Sequence[str], reads: Sequence[str] | None = None) -> Config:
    """Build the config of a command line such as `["config=configs/rear_b.yaml", "training.seed=1"]`.

    Args:
        reads: keys and sections that are read; sizes that contradict each other matter among these only. None: all.

    Raises:
        ConfigError: a missing file, a key that is unknown, duplicate or missing, a value of the wrong type or out of
            its range, or values that contradict each other.
    """
    merged = _defaults().copy()
    paths, overrides = _split_arguments(argv)
    for path in paths:
        _update(merged, read_yaml(path), str(path))
    for override in overrides:
        _update(merged, _parse_override(override), "command line")
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"{missing[0]}: missing value; give it in the YAML file or as {missing[0]}=...")
        config = cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from error
    check_ranges(config, [key for key in KEYS.values() if not key.mark(Follows)])  # causes before consequences
    check_fields(config)
    check_agreement(merged, keys_under([*KEYS] if reads is None else reads))
    check_ranges(config, [key for key in KEYS.values() if key.mark(Follows)])
    if config.model.generator.guidance_scale == 0:
        print("model.generator.guidance_scale=0 is taken as 1: without guidance, as published", file=sys.stderr)
    return config


def load_config_or_exit(doc: str, reads: Sequence[str], *checks: Callable[[Config], None]) -> Config:
    """`load_config` of a script's command line and further checks; an error becomes one line and exit status 2.

    Args:
        doc: what --help prints first: the script's docstring.
        reads: keys and sections that the script reads; --help explains them.
    """
    with input_errors_exit():
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(f"{doc}\nKeys that it reads, as key=value; config=FILE.yaml gives many at once:\n")
            print(format_keys(keys_under(reads)))
            raise SystemExit(0)
        try:
            config = load_config(sys.argv[1:], reads)
            for check in checks:
                check(config)
        except ConfigError as error:
            print(f"config error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
    return config


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML; `config=<path>` reads it back."""
    write_text(path, to_yaml(config))


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


@cache
def _defaults() -> DictConfig:
    """The schema; to be copied."""
    defaults = OmegaConf.structured(Config)
    for key in KEYS.values():
        if follows := key.mark(Follows):
            OmegaConf.update(defaults, key.name, str(follows))
    return defaults


def _split_arguments(argv: Sequence[str]) -> tuple[list[Path], list[str]]:
    paths, overrides = [], []
    for argument in argv:
        key, separator, value = argument.partition("=")
        if not separator or not key:
            raise ConfigError(f"command line: {argument!r} is not of the form key=value")
        if key == "config":
            paths.append(Path(value).expanduser())
        else:
            overrides.append(argument)
    if len(paths) > 1:
        raise ConfigError(f"command line: config= is given {len(paths)} times, expected once")
    return paths, overrides


def read_yaml(path: Path) -> dict[str, Any]:
    """The values of a file by dotted key, whether they are known or not.

    Raises:
        ConfigError: no such file, or one that is no YAML of sections.
    """
    path = _as_published(path)
    if not path.is_file():
        folders = (ROOT / "configs", Path("configs"), path.parent)
        found = {file.name: str(file) for folder in folders for file in sorted(folder.glob("*.yaml"))}
        near = difflib.get_close_matches(path.name, found, 1, 0.3)
        raise ConfigError(f"config={path}: no such file{_suggest([found[name] for name in near])}")
    try:
        _check_literals(yaml.compose(path.read_text("utf-8"), yaml.SafeLoader), str(path))
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or _first_line(error)
        raise ConfigError(f"{path}{f', line {mark.line + 1}' if mark else ''}: {problem}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: expected a mapping of sections, found a {type(loaded).__name__}")
    return dict(flat(OmegaConf.to_container(loaded)))


def _as_published(path: Path) -> Path:
    """The paper's commands name `configs/training/generator/<name>.yaml`; its files, as ours, lie in `configs/`."""
    here = path.parent.parent.parent / path.name
    if path.parts[-4:-1] != PUBLISHED_FOLDER or path.is_file() or not here.is_file():
        return path
    print(f"config={path}: no such file, {here} is used", file=sys.stderr)
    return here


def _parse_override(override: str) -> dict[str, Any]:
    """Text is taken literally; anything else is read as YAML."""
    name, _, text = override.partition("=")
    if name in KEYS and KEYS[name].is_text and text != "null":
        return {name: os.path.expanduser(text)}
    try:
        _check_literals(yaml.compose(text, yaml.SafeLoader), "command line", name)
        return dict(flat(OmegaConf.to_container(OmegaConf.from_dotlist([override]))))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"command line: {name}: {_first_line(error)}") from error


def _check_literals(node: yaml.Node | None, source: str, name: str = "") -> None:
    """Numbers and booleans stand there as they are meant, for YAML 1.1 reads 010 as 8, 1:30 as 90 and 1_0 as 10.

    Args:
        node: of the key `name` with all that is under it.
    """
    if isinstance(node, yaml.MappingNode):
        if name in KEYS:
            raise ConfigError(f"{source}: {name}: found a mapping, expected {KEYS[name].kind}")
        for key, value in node.value:
            _check_literals(value, source, f"{name}.{key.value}" if name else key.value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            if not isinstance(value, yaml.MappingNode):  # a mapping is checked by its type
                _check_literals(value, source, name)
    elif isinstance(node, yaml.ScalarNode) and name in KEYS:
        if not KEYS[name].may_be(node.value):
            raise ConfigError(f"{source}: {name}={node.value}: expected {KEYS[name].kind}")
        if KEYS[name].lists_texts and node.tag in NOT_TEXT and not re.fullmatch("-?(0|[1-9][0-9]*)", node.value):
            raise ConfigError(f"{source}: {name}={node.value}: expected text; put it in quotes")


def flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """By dotted key what stands in nested dicts."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _update(merged: DictConfig, values: dict[str, Any], source: str) -> None:
    for name, value in values.items():
        if {name, name.rsplit(".", 1)[-1]} & IGNORED_KEYS:
            print(f"{source}: {name} has no effect and is ignored", file=sys.stderr)
            continue
        if any(known.startswith(f"{name}.") for known in KEYS):
            raise ConfigError(f"{source}: {name} is a section of keys, found {value!r}")
        if name not in KEYS:
            raise ConfigError(f"{source}: unknown key {name!r}{_suggest(_nearest_key(name))}")
        key, word = KEYS[name], _as_word(value, KEYS[name].words)
        texts = word if key.type == list[str] and isinstance(word, list) else [word] if key.is_text else []
        if not all(isinstance(text, str | None) for text in texts):
            raise ConfigError(f"{source}: {name}={value}: expected text; put it in quotes")
        try:
            OmegaConf.update(merged, name, word)
        except ValidationError as error:
            near = difflib.get_close_matches(str(value), key.choices, 1, 0.3)
            raise ConfigError(f"{source}: {name}={value}: expected {key.kind}{_suggest(near)}") from error
        except OmegaConfBaseException as error:
            raise ConfigError(f"{source}: {name}: {_first_line(error)}") from error


def _as_word(value: Any, words: Sequence[str]) -> Any:
    """Undo YAML 1.1, which reads a bare `no`, `on` or `true` as a boolean where a word is meant."""
    text = str(value).lower()
    same = next((group for group in YAML_BOOLEANS if text in group), ())
    return next((word for word in (text, *same) if word in words), value)


def _nearest_key(name: str) -> list[str]:
    """The nearest key, compared as a whole and by the last part alone (a key in the wrong section)."""
    leaves = {known.rsplit(".", 1)[-1]: known for known in KEYS}
    return (
        difflib.get_close_matches(name, KEYS, 1, 0.8)
        or [leaves[match] for match in difflib.get_close_matches(name.rsplit(".", 1)[-1], leaves, 1, 0.6)]
        or difflib.get_close_matches(name, KEYS, 1, 0.3)
    )


def _suggest(near: Sequence[str]) -> str:
    return f"; did you mean {near[0]!r}?" if near else ""


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


if __name__ == "__main__":
    with input_errors_exit():
        if sys.argv[1:] == ["--keys"]:
            print(format_keys(list(KEYS.values())))
        else:
            print(to_yaml(load_config_or_exit(__doc__, [*KEYS])), end="")
