"""Marks that stand beside a key of the schema, in `Annotated[type, mark, ...]`; `utils.config` reads them."""

import math
from dataclasses import dataclass
from typing import Annotated, TypeVar

# What another value of a key means for a run that is continued. A key without such a mark: in the section model another
# value is refused, since it makes another model; elsewhere it is accepted, with a line in the log.
MAY_CHANGE = "may change in the middle of a run, with a line in the log"
SILENT = "may change in the middle of a run without a word: where and how it runs, logs and stops"


@dataclass(frozen=True)
class Range:
    """The numbers that make sense; for a list: each of its values. Infinity and NaN never do."""

    at_least: float = -math.inf
    at_most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.at_least <= value <= self.at_most and self.above < value < self.below

    def __str__(self) -> str:
        low = f"above {self.above}" if math.isfinite(self.above) else f"at least {self.at_least}"
        if math.isfinite(self.at_most):
            return f"{self.at_least} to {self.at_most}"
        return f"{self.at_least} to below {self.below}" if math.isfinite(self.below) else low


@dataclass(frozen=True)
class Words:
    """Words with a meaning of their own, in any case; all other text is taken as it is."""

    words: tuple[str, ...]


@dataclass(frozen=True)
class Follows:
    """The value comes from other keys unless it is given.

    Attributes:
        source: the key, or a formula for readers.
        interpolation: of OmegaConf; empty: the value of the key `source`.
        must_agree: a given value that differs is an error,
        free_for: but for these values of model.vq_model.model_type.
    """

    source: str
    interpolation: str = ""
    must_agree: bool = True
    free_for: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.interpolation or f"${{{self.source}}}"


T = TypeVar("T")
MayChange = Annotated[T, MAY_CHANGE]
Silent = Annotated[T, SILENT]
Count = Annotated[int, Range(at_least=1)]
NumberFrom0 = Annotated[int, Range(at_least=0)]
Seed = Annotated[int, Range(at_least=0, at_most=2**63 - 1)]
Weight = Annotated[float, Range(at_least=0)]
Positive = Annotated[float, Range(above=0)]
Share = Annotated[float, Range(at_least=0, at_most=1)]
ShareBelow1 = Annotated[float, Range(at_least=0, below=1)]
