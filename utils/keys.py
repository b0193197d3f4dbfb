"""The keys of the config as a table, read from the schema: what checks values, explains keys and resumes runs.

for key in KEYS.values():
    print(key.name, key.default, key.allowed)
"""

import ast
import dataclasses
import inspect
import io
import re
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING

from utils import schema
from utils.marks import Follows, Range, Words

M = TypeVar("M")
UNIONS = (Union, UnionType)
INTEGER = r"(0|[1-9][0-9]*|[1-9][0-9]{0,2}(_[0-9]{3})+)"  # published files hold 50_000
FLOAT = rf"({INTEGER}(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?"
KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list[int]: "a list of whole numbers",
    list[float]: "a list of numbers",
    list[str]: "a list of texts, as [a, b]",
    list[schema.ParamGroupConfig]: "a list of {pattern: ..., lr_factor: ..., weight_decay: ...}",
    type(None): "null",
}


@dataclass(frozen=True)
class Key:
    name: str  # dotted: section.key
    section: type  # dataclass of the schema
    type: Any  # without marks: int, str | None, Literal[...]
    default: Any
    marks: tuple[Any, ...]

    def mark(self, kind: type[M]) -> M | None:
        return next((mark for mark in self.marks if isinstance(mark, kind)), None)

    @property
    def choices(self) -> tuple[str, ...]:
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    @property
    def words(self) -> tuple[str, ...]:
        """Choices, or words that have a meaning among other text."""
        return self.choices or (self.mark(Words) or Words(())).words

    @property
    def _parts(self) -> tuple[Any, ...]:
        """The types of which the value may be."""
        return get_args(self.type) if get_origin(self.type) in UNIONS else (self.type,)

    @property
    def is_text(self) -> bool:
        return str in self._parts

    @property
    def lists_texts(self) -> bool:
        return list[str] in self._parts

    def may_be(self, text: str) -> bool:
        """Whether this text of a command line or file says a value of this type, or one in a list of them, as it is.
        What it says of NaN and infinity and of other keys is for others to check."""
        kinds = {kind for part in self._parts for kind in get_args(part) or (part,)}
        if not {bool, int, float} & kinds or text in ("null", "~", "") or text.startswith("${"):
            return True
        if bool in kinds:
            return text.lower() in ("true", "false", "yes", "no", "on", "off")
        unsigned = text.lstrip("+-")
        if float in kinds and unsigned.lower().lstrip(".") in ("nan", "inf"):
            return True
        return bool(re.fullmatch(r"[+-]?" + (FLOAT if float in kinds else INTEGER), text))

    @property
    def allowed(self) -> str:
        """Range or choices, for readers; empty if the type says all."""
        if self.type is bool:
            return "true or false"
        return ", ".join(self.choices) or str(self.mark(Range) or "")

    @property
    def kind(self) -> str:
        """What can be given, for error lines."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        return " or ".join(KINDS[part] for part in self._parts)

    @property
    def meaning(self) -> str:
        """The comment behind the key in the schema, or above it."""
        return _comments()[self.section.__name__, self.name.rsplit(".", 1)[-1]]


def _keys_of(section: type, prefix: str) -> Iterator[Key]:
    types, annotations = get_type_hints(section), get_type_hints(section, include_extras=True)
    for field in dataclasses.fields(section):
        name, factory = f"{prefix}{field.name}", field.default_factory
        if dataclasses.is_dataclass(types[field.name]):
            yield from _keys_of(types[field.name], f"{name}.")
        else:
            default = field.default if factory is dataclasses.MISSING else factory()
            yield Key(name, section, types[field.name], default, tuple(_marks_of(annotations[field.name])))


def _marks_of(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Annotated:
        yield from _marks_of(annotation.__origin__)
        yield from annotation.__metadata__
    elif get_origin(annotation) in UNIONS:
        for part in get_args(annotation):
            yield from _marks_of(part)


@cache
def _comments() -> dict[tuple[str, str], str]:
    """By class and field: the comments that stand alone in the lines above, and the one behind it."""
    source = inspect.getsource(schema)
    behind: dict[int | None, str] = {}
    alone: dict[int | None, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines = alone if token.line.lstrip().startswith("#") else behind
            lines[token.start[0]] = token.string.lstrip("# ")
    comments = {}
    for section in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
        for field in (node for node in section.body if isinstance(node, ast.AnnAssign)):
            above = field.lineno
            while above - 1 in alone:
                above -= 1
            words = [alone[line] for line in range(above, field.lineno)]
            name = ast.unparse(field.target)
            comments[section.name, name] = " ".join([*words, behind.get(field.end_lineno, "")]).strip()
    return comments


KEYS = {key.name: key for key in _keys_of(schema.Config, "")}


def keys_under(names: Sequence[str]) -> list[Key]:
    """The keys of these names and sections in the order of the schema; those named "-section.key" are left out."""

    def named(key: Key, prefix: str) -> bool:
        return any(f"{prefix}{key.name}.".startswith(f"{name}.") for name in names)

    return [key for key in KEYS.values() if named(key, "") and not named(key, "-")]


def format_keys(keys: Sequence[Key]) -> str:
    """A line for each key: key=default, range or choices, meaning."""
    rows = [(f"{key.name}={_default(key)}", key.allowed, _explain(key)) for key in keys]
    widths = [min(max(len(row[column]) for row in rows), limit) for column, limit in enumerate((50, 24))]
    return "\n".join("  ".join([row[0].ljust(widths[0]), row[1].ljust(widths[1]), row[2]]) for row in rows)


def _default(key: Key) -> str:
    if key.default == MISSING:
        return "..."
    text = key.default if isinstance(key.default, str) else yaml.safe_dump(key.default, default_flow_style=True)
    return text.splitlines()[0]


def _explain(key: Key) -> str:
    follows = key.mark(Follows)
    return f"{key.meaning}; by default {follows.source}" if follows else key.meaning
