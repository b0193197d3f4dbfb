"""Configs from strangers: no value from outside the config, no endless work, and only the section model of a model."""

from itertools import pairwise
from pathlib import Path

import pytest

from utils.config import MAX_BYTES, load_config, to_yaml
from utils.keys import ConfigError

OUT = "experiment.output_dir=out"


def in_file(path: Path, text: str) -> list[str]:
    path.write_text(text)
    return [f"config={path}"]


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:SECRET}",
        "a/${oc.env:SECRET,none}/b",
        "${ oc.env : SECRET }",
        "${${experiment.project}:SECRET}",
        "$${experiment.project}{oc.env:SECRET}",
        "\\${oc.env:SECRET}",
        "${oc.decode:${oc.env:SECRET}}",
        "${oc.create:[1]}",
        "${codes_per_image:64,[1,1]}",
        "${experiment[project]}",
    ],
)
@pytest.mark.parametrize("key", ["experiment.name", "experiment.generator_checkpoint", "experiment.tags"])
@pytest.mark.parametrize("where", ["file", "command line"])
def test_only_keys_are_interpolated(
    where: str, key: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "of_the_user")
    section, _, name = key.partition(".")
    in_list = f"['{value}']" if name == "tags" else value
    text = in_list if name == "tags" else f"'{value}'"
    given = in_file(tmp_path / "c.yaml", f"{section}:\n  {name}: {text}\n") if where == "file" else [f"{key}={in_list}"]
    with pytest.raises(ConfigError, match=rf"{key}=.*expected") as error:
        load_config(["experiment.project=oc.env", OUT, *given])
    assert "of_the_user" not in str(error.value)


def test_keys_are_interpolated(tmp_path: Path) -> None:
    text = "experiment: {project: p, name: '${.project}-${training.seed}', group: '${experiment.name}'}\n"
    config = load_config([OUT, *in_file(tmp_path / "c.yaml", text)])
    assert config.experiment.group == "p-42"
    assert "${" not in to_yaml(config)


def nested(levels: int, line: str, last: str) -> str:
    """Lines in which each of `levels` names stands nine times for the one before."""
    names = "abcdefghijklmnop"[: levels + 1]
    return "\n".join([f"a: &a {last}", *(line.format(b, a, *[a] * 8) for a, b in pairwise(names))])


GENERATOR_KEYS = ("hidden_size", "num_hidden_layers", "intermediate_size", "dropout", "attn_drop", "top_k", "top_p")
HOSTILE = {
    "aliases of mappings": nested(10, "{0}: &{0} {{x: *{1}, y: *{2}, z: *{3}, u: *{4}, v: *{5}, w: *{6}}}", "{x: 1}"),
    "aliases of lists": nested(10, "{0}: &{0} [*{1}, *{2}, *{3}, *{4}, *{5}, *{6}, *{7}, *{8}]", "[1]"),
    "merges": nested(10, "{0}: &{0} {{<<: [*{1}, *{2}, *{3}, *{4}, *{5}, *{6}, *{7}, *{8}]}}", "{x: 1}"),
    "a mapping within itself": "model: &m {vq_model: *m}",
    "a list within itself": "training: {seed: &m [*m]}",
    "a merge of itself": "model: &m {<<: *m, x: 1}",
    "deep mappings": '{"a":' * 3000 + "1" + "}" * 3000,
    "deep lists": "training: {seed: " + "[" * 3000 + "]" * 3000 + "}",
    "many keys": "{" + ",".join(f"k{i}: 1" for i in range(11_000)) + "}",
    "many bytes": "training: {seed: " + "1" * MAX_BYTES + "}",
    "interpolations": "model: {generator: {"
    + ", ".join(f"{a}: '{f'${{model.generator.{b}}}' * 9}'" for a, b in pairwise(GENERATOR_KEYS))
    + "}}",
    "an interpolated section": "experiment: {name: '${model}'}",
    "a circle": "experiment: {name: '${.group}', group: '${.name}'}",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_endless_work_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:  # without the limits it lasts for hours
        load_config([OUT, *in_file(tmp_path / "c.yaml", HOSTILE[kind])])
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_aliases_and_merges_are_read(tmp_path: Path) -> None:
    text = "training: &t {seed: &s 7}\nsampling: {<<: *t}\nexperiment: {name: *s}\n"
    config = load_config([OUT, *in_file(tmp_path / "c.yaml", text)])
    assert (config.training.seed, config.sampling.seed, config.experiment.name) == (7, 7, "7")


@pytest.mark.parametrize("key", ["experiment.generator_checkpoint", "training.seed", "sampling.seed", "demo.host"])
def test_the_config_of_a_model_sets_the_model_only(key: str, tmp_path: Path) -> None:
    section, _, name = key.partition(".")
    text = f'{{"model": {{"generator": {{"top_k": 3}}}}, "{section}": {{"{name}": 1}}}}'
    with pytest.raises(ConfigError, match=f"found {key}, expected only the section model"):
        load_config([OUT, *in_file(tmp_path / "config.json", text)])
    config = load_config([OUT, *in_file(tmp_path / "config.json", text.partition(', "' + section)[0] + "}")])
    assert config.model.generator.top_k == 3
