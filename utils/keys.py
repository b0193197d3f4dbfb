"""Config keys: how a section declares them, and the table of all keys of a config.

@dataclass
class SamplingConfig:
    seed: Seed = key(42, "image i depends on (weights, config, seed, i) only")
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache, cached_property
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from msgspec import Meta, ValidationError, convert, inspect

from utils.errors import InputError

MISSING = "???"  # default of a key that must be given
REQUIRED: Any = dataclasses.MISSING  # default of a value that must be given in each entry of a list

# Annotations: what a changed value means for a run that is resumed. Without one, a changed value in the section model
# is refused (the model would be different), and elsewhere accepted and logged.
MAY_CHANGE = "may change during a run, which is logged"
SILENT = "may change during a run, which is not logged: where and how it runs, logs and stops"

T = TypeVar("T")
MayChange = Annotated[T, MAY_CHANGE]
Silent = Annotated[T, SILENT]
NonEmpty = Annotated[T, Meta(min_length=1)]
PositiveInt = Annotated[int, Meta(ge=1)]
NonNegativeInt = Annotated[int, Meta(ge=0)]
PositiveFloat = Annotated[float, Meta(gt=0)]
NonNegativeFloat = Annotated[float, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
FractionBelow1 = Annotated[float, Meta(ge=0, lt=1)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]

BOOLEANS = (("true", "on", "yes"), ("false", "off", "no"))  # synonyms in YAML 1.1
INTEGER = r"(0|[1-9][0-9]*|[1-9][0-9]{0,2}(_[0-9]{3})+)"  # decimal; published files have 50_000
NUMBER = re.compile(rf"[+-]?({INTEGER}(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


class ConfigError(InputError):
    """A wrong config. The message names the key, the value found and the value expected."""


def key(
    default: Any, help: str, *, equals: str | None = None, default_from: str | None = None, words: tuple[str, ...] = ()
) -> Any:
    """Declare a key: a dataclass field.

    Args:
        help: what it means, for --help and --keys.
        equals: key, or formula, that the value is derived from; a given value that differs is an error.
        default_from: key that the value is derived from unless it is given.
        words: texts with a meaning of their own, in lower or upper case; any other text is taken literally.
    """
    metadata = {"help": help, "equals": equals, "default_from": default_from, "words": words}
    if isinstance(default, list):
        return field(default_factory=lambda: [*default], metadata=metadata)
    return field(default=default, metadata=metadata)


def section(section_class: type) -> Any:
    """Declare a section: a dataclass field with the defaults of `section_class`."""
    return field(default_factory=section_class)


@dataclass(frozen=True)
class Key:
    name: str  # dotted: section.key
    section: type  # the dataclass that declares it
    hint: Any  # type with annotations
    default: Any
    help: str
    equals: str | None
    default_from: str | None
    words: tuple[str, ...]

    @cached_property
    def types(self) -> tuple[inspect.Type, ...]:
        """Alternatives, such as int and None."""
        info = inspect.type_info(self.hint)
        return info.types if isinstance(info, inspect.UnionType) else (info,)

    @cached_property
    def choices(self) -> tuple[str, ...]:
        hint = get_args(self.hint)[0] if get_origin(self.hint) is Annotated else self.hint
        return get_args(hint) if get_origin(hint) is Literal else ()

    @property
    def source(self) -> str | None:
        return self.equals or self.default_from

    @property
    def is_text(self) -> bool:
        return any(isinstance(one, inspect.StrType) for one in self.types)

    @property
    def allowed(self) -> str:
        """What can be given, for readers."""
        return " | ".join(self.choices or map(_describe, self.types))

    def has(self, annotation: str) -> bool:
        return annotation in getattr(self.hint, "__metadata__", ())

    def read(self, given: Any) -> Any:
        """The value that is given by a file or the command line (None, a text, a list of texts or mappings) or from
        Python.

        Raises:
            ConfigError: this key cannot have it.
        """
        self._check_names(given)
        for interpret in (self._word, _number, _boolean):
            with suppress(ValidationError):
                value = convert(_map_values(interpret, given), self.hint)
                if _is_finite(value):
                    return value
        found = "null" if given is None else str(given).replace("'", "")
        near = did_you_mean(difflib.get_close_matches(found, self.choices, 1, 0.3))
        raise ConfigError(f"{self.name}={found}: expected {self.allowed}{near}")

    def _check_names(self, given: Any) -> None:
        """Check the names in a list of mappings, since msgspec accepts unknown names."""
        items = [one.item_type for one in self.types if isinstance(one, inspect.ListType)]
        known = [field.name for item in items if isinstance(item, inspect.DataclassType) for field in item.fields]
        mappings = [one for one in given if isinstance(one, dict)] if isinstance(given, list) else []
        for name in (name for mapping in mappings for name in mapping if name not in known):
            near = did_you_mean(difflib.get_close_matches(str(name), known, 1, 0.3))
            raise ConfigError(f"{self.name}: unknown name {name!r}, expected {', '.join(known)}{near}")

    def _word(self, given: Any) -> Any:
        """Choices and words are meant in lower or upper case, and by their synonyms in YAML."""
        if not isinstance(given, str):
            return given
        synonyms = next((group for group in BOOLEANS if given.lower() in group), (given.lower(),))
        return next((word for word in (given.lower(), *synonyms) if word in self.choices or word in self.words), given)


def _map_values(interpret: Callable[[Any], Any], given: Any) -> Any:
    """Interpret a text, or the texts in a list or mapping."""
    if isinstance(given, list):
        return [_map_values(interpret, one) for one in given]
    if isinstance(given, dict):
        return {name: _map_values(interpret, one) for name, one in given.items()}
    return interpret(given)


def _is_finite(value: Any) -> bool:
    if is_dataclass(value):
        return _is_finite([*vars(value).values()])
    if isinstance(value, list):
        return all(_is_finite(one) for one in value)
    return not isinstance(value, float) or math.isfinite(value)


def _number(given: Any) -> Any:
    if not isinstance(given, str) or not NUMBER.fullmatch(given):
        return given
    return float(given) if re.search("[.eE]", given) else int(given)


def _boolean(given: Any) -> Any:
    values = [group[0] == "true" for group in BOOLEANS if isinstance(given, str) and given.lower() in group]
    return values[0] if values else given


def _describe(info: inspect.Type) -> str:
    match info:
        case inspect.NoneType():
            return "null"
        case inspect.BoolType():
            return "true | false"
        case inspect.ListType():
            return f"{'non-empty ' if info.min_length else ''}list of {_describe(info.item_type)}"
        case inspect.UnionType():
            return " | ".join(map(_describe, info.types))
        case inspect.DataclassType():
            return f"{{{', '.join(f'{one.name}: {_describe(one.type)}' for one in info.fields)}}}"
        case inspect.IntType() | inspect.FloatType():
            bounds = {">=": info.ge, ">": info.gt, "<=": info.le, "<": info.lt}
            limits = ", ".join(f"{sign} {bound}" for sign, bound in bounds.items() if bound is not None)
            return f"{type(info).__name__.removesuffix('Type').lower()} {limits}"
    return "text"


def keys_of(section_class: Any) -> dict[str, Key]:
    """The keys of a config class, or of the class of a section, by name in the order of the schema."""
    return _keys_of_class(section_class)


@cache
def _keys_of_class(section_class: Any) -> dict[str, Key]:
    return {key.name: key for key in _keys_of(section_class, "")}


def _keys_of(section_class: Any, prefix: str) -> Iterator[Key]:
    hints = get_type_hints(section_class, include_extras=True)
    for one in fields(section_class):
        name, hint, factory = f"{prefix}{one.name}", hints[one.name], one.default_factory
        if is_dataclass(hint):
            yield from _keys_of(hint, f"{name}.")
        else:
            default = one.default if factory is dataclasses.MISSING else factory()
            yield Key(name=name, section=section_class, hint=hint, default=default, **one.metadata)


def select(keys: dict[str, Key], reads: dict[str, str]) -> list[Key]:
    """Keys by section.

    Args:
        reads: by section: "all", "all but NAME NAME" or "NAME NAME".
    """
    selected = []
    for section, words in reads.items():
        kind, *names = words.split()
        if kind == "all":
            without = {f"{section}.{name}" for name in names[1:]}
            selected += [key for name, key in keys.items() if is_in(name, section) and name not in without]
        else:
            selected += [keys[f"{section}.{name}"] for name in words.split()]
    return selected


def is_in(name: str, section: str) -> bool:
    return name.startswith(f"{section}.")


def format_keys(keys: Sequence[Key]) -> str:
    """A line for each key: key=default, what can be given, meaning."""
    rows = [(f"{key.name}={_default(key)}", key.allowed, _explain(key)) for key in keys]
    widths = [min(max(len(row[column]) for row in rows), limit) for column, limit in enumerate((50, 24))]
    return "\n".join("  ".join([row[0].ljust(widths[0]), row[1].ljust(widths[1]), row[2]]) for row in rows)


def _default(key: Key) -> str:
    if key.default == MISSING:
        return "..."
    text = key.default if isinstance(key.default, str) else yaml.safe_dump(key.default, default_flow_style=True)
    return text.splitlines()[0]


def _explain(key: Key) -> str:
    return f"{key.help}; by default {key.source}" if key.source else key.help


def did_you_mean(near: Sequence[str]) -> str:
    """The end of an error message."""
    return f"; did you mean {near[0]!r}?" if near else ""
