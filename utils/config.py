"""Configuration: schema defaults < YAML file of `config=` < `key=value` arguments.

python -m utils.config --keys                                       every key, its default, range and meaning
python -m utils.config config=configs/rear_b.yaml training.seed=1   the resolved config, without running anything
"""

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils.config_checks import check_agreement, check_combinations, check_ranges, codes_per_image
from utils.errors import first_line, input_errors_exit
from utils.files.atomic import write_text
from utils.files.text import user_path
from utils.keys import MISSING, ConfigError, Key, did_you_mean, format_keys, is_in, keys_of, select
from utils.schema import GRID, Config

C = TypeVar("C", bound=Config)

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED_FOLDER = ("configs", "training", "generator")
# Sections that one script declares; the others accept and ignore them.
SCRIPT_SECTIONS = {
    "vq_training": "scripts/train_tokenizer.py",
    "inspection": "scripts/inspect_codes.py",
    "completion": "scripts/complete_images.py",
    "sweep": "scripts/sweep_guidance.py",
    "demo": "scripts/demo.py",
}
# Keys of published YAML files that nothing reads, there or here: ignored with a notice.
IGNORED_KEYS = {"log_grad_norm_every", "kv_cache", "finetune_decoder", "pretrained_tokenizer_weight"}
# In this section only, VQGAN+'s and TiTok's: for their training, or known from the weights.
IGNORED_VQ_KEYS = {"commitment_cost", "entropy_loss_weight", "entropy_loss_temperature", "entropy_gamma"}
IGNORED_VQ_KEYS |= {"num_channels", "num_resolutions", "sample_with_conv"}
IGNORED_KEYS |= {f"model.vq_model.{name}" for name in IGNORED_VQ_KEYS}

MODEL_CONFIG_FILE = "config.json"  # of an exported model or tokenizer, often from someone else: its section model only
MAX_BYTES, MAX_VALUES = 100_000, 10_000  # of a file; the config of a run has about 3,000 bytes and 200 values
INTERPOLATION = re.compile(r"\$\{\.*\w+(\.\w+)*\}")  # of a key; not of a resolver such as oc.env, a secret's way out
MAX_EXPANSION = 1000  # of a text by interpolations of interpolations

OmegaConf.register_resolver("codes_per_image", codes_per_image, replace=True)
GRID_INTERPOLATION = "${codes_per_image:${model.vq_model.resolution},${model.vq_model.channel_mult}}"


def load_config(argv: Sequence[str], reads: dict[str, str] | None = None) -> Config:
    """`load_config_as` for the config without the sections of single scripts."""
    return load_config_as(Config, argv, reads)


def load_config_as(config_class: type[C], argv: Sequence[str], reads: dict[str, str] | None = None) -> C:
    """Build the config of a command line such as `["config=configs/rear_b.yaml", "training.seed=1"]`.

    Args:
        config_class: `Config`, or a script's own with one more section.
        reads: keys that are read, as for `select`: only these must agree with what they are derived from. None: all.

    Raises:
        ConfigError: a missing file, a key that is unknown, duplicate or missing, a value of the wrong type or out of
            its range, or values that contradict each other.
    """
    keys, config = keys_of(config_class), config_class()
    tree = OmegaConf.create(asdict(config))
    for key in keys.values():
        if key.source:
            OmegaConf.update(tree, key.name, GRID_INTERPOLATION if key.source == GRID else f"${{{key.source}}}")
    sources, expansion = {}, 1
    for source, name, value in given_values(argv, keys):
        if _is_key(name, value, source, keys):
            sources[name] = f"{source}: "
            if "${" in INTERPOLATION.sub("", str(value)):
                raise ConfigError(f"{source}: {name}={value}: expected ${{section.key}} as the only use of ${{")
            expansion *= max(1, len(INTERPOLATION.findall(str(value))))
            if expansion > MAX_EXPANSION:
                raise ConfigError(f"{source}: {name}: found too many uses of ${{...}}, expected fewer")
            is_interpolation = "${" in str(value)
            OmegaConf.update(tree, name, value if is_interpolation else _read(keys[name], value, sources))
    try:
        resolved = dict(flat(OmegaConf.to_container(tree, resolve=True)))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {first_line(error)}") from error
    for name, key in keys.items():
        if name not in resolved:
            raise ConfigError(f"{sources[name]}{name}: found ${{...}} of a section, expected that of a key")
        section, _, leaf = name.rpartition(".")
        value = _read(key, resolved[name], sources) if name in sources else resolved[name]
        setattr(attrgetter(section)(config), leaf, os.path.expanduser(value) if isinstance(value, str) else value)
    missing = [name for name in keys if attrgetter(name)(config) == MISSING]
    if missing:
        raise ConfigError(f"{missing[0]}: missing value; give it in the YAML file or as {missing[0]}=...")
    check_combinations(config)
    check_agreement(config, [*keys.values()] if reads is None else select(keys, reads))
    check_ranges(config)  # of derived values
    if config.model.generator.guidance_scale == 0:
        _notice("model.generator.guidance_scale=0 is taken as 1: no guidance, as in the published code")
    return config


def load_config_or_exit(
    config_class: type[C], doc: str, reads: dict[str, str], check: Callable[[C], None] | None = None
) -> C:
    """`load_config_as` of a script's command line; an error becomes one line and exit status 2.

    Args:
        doc: what --help prints first: the script's docstring.
        reads: keys that the script reads, as for `select`: --help explains them, and others on the command line are
            reported.
        check: a further check.
    """
    argv = sys.argv[1:]
    with input_errors_exit():
        read_keys = select(keys_of(config_class), reads)
        if {"-h", "--help"} & {*argv}:
            print(f"{doc}\nKeys that it reads, as key=value; config=FILE.yaml gives many at once:\n")
            print(format_keys(read_keys))
            raise SystemExit(0)
        try:
            config = load_config_as(config_class, argv, reads)
            if check is not None:
                check(config)
        except ConfigError as error:
            print(f"config error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        read_names = {"config", *(key.name for key in read_keys)}
        unread = [name for name, _, _ in (argument.partition("=") for argument in argv) if name not in read_names]
        if unread:
            _notice(f"{Path(sys.argv[0]).name} does not read {', '.join(unread)}")
    return config


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML; `config=<path>` reads it back."""
    write_text(path, to_yaml(config))


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def given_values(argv: Sequence[str], keys: dict[str, Key]) -> Iterator[tuple[str, str, Any]]:
    """Source, name and value (None, a text or a list of texts) of all that the file and the command line give."""
    pairs = [argument.partition("=") for argument in argv]
    for name, separator, value in pairs:
        if not name or not separator:
            raise ConfigError(f"command line: {name + separator + value!r} is not of the form key=value")
    paths = [value for name, _, value in pairs if name == "config"]
    if len(paths) > 1:
        raise ConfigError(f"command line: config= is given {len(paths)} times, expected once")
    for path in paths:
        yield from ((path, name, value) for name, value in read_yaml(user_path(path)).items())
    for name, _, text in pairs:
        if name in keys and keys[name].is_text and text != "null":
            yield "command line", name, text  # literally
        elif name != "config":
            try:
                values = [*flat({name: yaml.load(text, TextLoader)})]
            except (yaml.YAMLError, RecursionError) as error:
                raise ConfigError(f"command line: {name}: {_problem(error)}") from error
            yield from (("command line", *item) for item in values)


def read_yaml(path: Path) -> dict[str, Any]:
    """The values of a file by dotted key, known or not: None, texts and lists of texts.

    Raises:
        ConfigError: no such file, not a YAML file of sections, too large, or a model's with a section other than model.
    """
    here = path.parent.parent.parent / path.name
    if path.parts[-4:-1] == PUBLISHED_FOLDER and here.is_file() and not path.is_file():
        _notice(f"config={path}: no such file, {here} is used")  # the name in the paper's commands
        path = here
    if not path.is_file():
        folders = (ROOT / "configs", Path("configs"), path.parent)
        found = {file.name: str(file) for folder in folders for file in sorted(folder.glob("*.yaml"))}
        near = difflib.get_close_matches(path.name, found, 1, 0.3)
        raise ConfigError(f"config={path}: no such file{did_you_mean([found[name] for name in near])}")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ConfigError(f"{path}: found {size} bytes, expected a config of at most {MAX_BYTES}")
    try:
        loaded = yaml.load(path.read_text("utf-8-sig"), TextLoader)
        if not isinstance(loaded, dict):
            raise ConfigError(f"{path}: expected a mapping of sections, found a {type(loaded).__name__}")
        values = dict(flat(loaded))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: {_problem(error)}") from error
    other = [name for name in values if path.name == MODEL_CONFIG_FILE and not is_in(name, "model")]
    if other:
        raise ConfigError(f"{path}: found {other[0]}, expected only the section model in a model's {path.name}")
    return values


class TextLoader(yaml.SafeLoader):
    """Reads every value as text, except null: what a text means is up to the key. YAML 1.1 takes a bare `no` for a
    boolean, 010 for 8 and 2026_11_25 for a number. Refuses too many values: aliases of aliases stand for billions."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.count = 0  # of the values so far, with those that an alias stands for
        self.counts: dict[str | None, int] = {}  # by anchor

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event, before = self.peek_event(), self.count
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent):
            self.count += self.counts.get(event.anchor, MAX_VALUES)  # not counted yet: within itself, without end
        else:
            self.count += 1
            self.counts[event.anchor] = self.count - before
        if self.count > MAX_VALUES:
            problem = f"found more than {MAX_VALUES} values, with those of aliases"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: list[Any] = []
        for name, _ in node.value:
            if name.value in names:
                raise yaml.MarkedYAMLError(problem=f"found duplicate key {name.value}", problem_mark=name.start_mark)
            names.append(name.value)
        return super().construct_mapping(node, deep)


KEPT_TAGS = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
TextLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in KEPT_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested dicts by dotted key."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _problem(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "found too many sections within sections"
    return getattr(error, "problem", None) or first_line(error)


def _is_key(name: str, value: Any, source: str, keys: dict[str, Key]) -> bool:
    """False: it is accepted without effect.

    Raises:
        ConfigError: an unknown key.
    """
    if name in keys:
        return True
    if {name, name.rsplit(".", 1)[-1]} & IGNORED_KEYS:
        _notice(f"{source}: {name} has no effect and is ignored")
        return False
    if any(is_in(known, name) for known in keys):
        if value not in ({}, None):
            raise ConfigError(f"{source}: {name} is a section of keys, found {value!r}")
        return False
    sections = {known.partition(".")[0] for known in keys}
    if name.partition(".")[0] in SCRIPT_SECTIONS.keys() - sections:
        return False
    leaves = {known.rsplit(".", 1)[-1]: known for known in keys}
    near = (
        difflib.get_close_matches(name, keys, 1, 0.8)
        or [leaves[match] for match in difflib.get_close_matches(name.rsplit(".", 1)[-1], leaves, 1, 0.6)]  # elsewhere
        or difflib.get_close_matches(name, keys, 1, 0.3)
    )
    raise ConfigError(f"{source}: unknown key {name!r}{did_you_mean(near)}")


def _read(key: Key, value: Any, sources: dict[str, str]) -> Any:
    try:
        return key.read(value)
    except ConfigError as error:
        raise ConfigError(f"{sources[key.name]}{error}") from error


def _notice(text: str) -> None:
    """One line, from the first process of a launch."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def main() -> None:
    keys, argv = keys_of(Config), sys.argv[1:]
    if argv == ["--keys"]:
        print(format_keys([*keys.values()]))
        print("\nMore keys, explained by the --help of a script:")
        print("\n".join(f"{section}  {script}" for section, script in SCRIPT_SECTIONS.items()))
        return
    sections = {name.partition(".")[0]: "all" for name in keys}
    print(to_yaml(load_config_or_exit(Config, str(__doc__), sections)), end="")
    of_scripts: dict[str, dict[str, Any]] = {}
    for _, name, value in given_values(argv, keys):
        section, _, leaf = name.partition(".")
        if section in SCRIPT_SECTIONS:
            of_scripts.setdefault(section, {})[leaf] = value
    if of_scripts:
        print(yaml.safe_dump(of_scripts, sort_keys=False, allow_unicode=True), end="")


if __name__ == "__main__":
    with input_errors_exit():
        main()
