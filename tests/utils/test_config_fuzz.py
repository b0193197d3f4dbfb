"""Random command lines: refused in one line, or the config has the typed values."""

import random
from pathlib import Path

import pytest

from utils.config import load_config
from utils.keys import ConfigError, keys_of
from utils.schema import Config

KEYS = keys_of(Config)
LINES = {"command line": 400, "file": 100}
ODD = (
    *("", " ", "#", "exp #2", "2026_11_25", "0123", "010", "12:30", "1:30", "1e5", "1_000", "0x10", "0b1", "+5", ".5"),
    *("nan", "inf", "-inf", "-1", "0", "1", "1.0", "2", "18446744073709551615", "1e400", "-0", "00", "1e-400"),
    *("true", "True", "yes", "no", "off", "on", "null", "~", "~/x", "None", "[1,2]", "[]", "{}", "{a: 1}", "a: b"),
    *("'quoted'", '"', "[", "{", "&a", "*a", "!!python/object:x", "%", "@", "`", "a=b", "${x}", "${training.seed}"),
    *("é", "\N{SNOWMAN}", "a\nb", "a\tb", "-", "---", "|", ">", "switch", "bf16", "adamw", "ten_crop", "skip", "auto"),
)


def typed(rng: random.Random) -> str:
    """A key, mostly one that exists, and a value, mostly an odd one."""
    names = list(KEYS)
    key = rng.choice(names) if rng.random() < 0.9 else rng.choice([*names, "x.y", "training", "config.", "=", "a b"])
    if rng.random() < 0.1:
        key = key[: rng.randrange(len(key) + 1)] + rng.choice("._ =x") + key[-2:]
    value = rng.choice(ODD) if rng.random() < 0.8 else str(rng.choice([rng.randint(-5, 5), rng.uniform(-2, 2), 1e9]))
    return f"{key}={value}"


def in_file(folder: Path, name: str, text: str) -> str:
    """The argument for a file that holds this key and value."""
    *sections, key = name.split(".")
    lines = [f"{'  ' * depth}{part}:" for depth, part in enumerate([*sections, key])]
    (folder / "typed.yaml").write_text("\n".join(lines) + f" {text}\n")
    return f"config={folder / 'typed.yaml'}"


@pytest.mark.parametrize("road", LINES)
def test_no_argument_gives_a_traceback_or_another_value(road: str, tmp_path: Path) -> None:
    rng, loaded = random.Random(0), 0
    for _ in range(LINES[road]):
        argument = typed(rng)
        name, _, text = argument.partition("=")
        needed = [] if name == "experiment.output_dir" else ["experiment.output_dir=out"]
        refusal = ""
        try:
            config = load_config([*needed, argument if road == "command line" else in_file(tmp_path, name, text)])
        except ConfigError as error:
            refusal = str(error)
        assert "\n" not in refusal, argument
        if refusal:
            continue
        loaded += 1
        value = config
        for part in name.split("."):
            value = getattr(value, part, None)
        key = KEYS.get(name)
        if key is None or text.startswith("${"):
            continue  # accepted and ignored with a notice; the value of another key
        if key.is_text and road == "file":
            assert value is None or isinstance(value, str), argument  # quotes and comments are for YAML to read
        elif key.is_text and text not in ("null", *key.words) and not text.startswith("~"):
            assert value == text or str(value).lower() in key.words, argument
        elif isinstance(value, bool):
            assert str(value).lower() == text.lower() or text.lower() in ("yes", "no", "on", "off"), argument
        elif isinstance(value, int | float) and not isinstance(value, bool):
            assert float(text) == float(value), argument  # Python takes 1_000 as YAML does
    assert loaded > LINES[road] / 20


@pytest.mark.parametrize("text", ["010", "1:30", "1_00", "0x10", "[1, 010]", "'010'"])
@pytest.mark.parametrize("road", LINES)
def test_numbers_are_decimal(road: str, text: str, tmp_path: Path) -> None:
    for key in ("training.max_train_steps", "optimizer.params.learning_rate", "model.vq_model.channel_mult"):
        argument = f"{key}={text}" if road == "command line" else in_file(tmp_path, key, text)
        with pytest.raises(ConfigError, match=rf"{key}=.*: expected (non-empty list of )?(int|float)"):
            load_config(["experiment.output_dir=out", argument])
