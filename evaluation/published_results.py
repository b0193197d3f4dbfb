"""Published results (configs/published_results.yaml): settings, expected scores and their tolerances."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils.errors import InputError, first_line

METRICS = {  # by back end of the evaluator
    "inception": ("inception_score", "fid", "sfid", "precision", "recall"),
    "efficientnet_lite0": ("frechet_distance",),
}
FromZero = Annotated[float, msgspec.Meta(ge=0)]


class Brought(msgspec.Struct, forbid_unknown_fields=True):
    """A file, and how to get it."""

    file: str
    get: str


class Tolerance(msgspec.Struct, forbid_unknown_fields=True):
    """How far from the expected number a right model may be."""

    reason: str
    relative: FromZero = 0.0  # as a share of the expected number
    absolute: FromZero = 0.0  # and this in addition


class Row(msgspec.Struct, forbid_unknown_fields=True):
    """
    Attributes:
        checkpoint: a file or the folder of a run.
        sha256: of that file; None: not known.
        get: how to get checkpoint and tokenizer.
        expected: all metrics of a back end; None: not published.
        tolerance: name of a group of tolerances.
        published: where the numbers are from.
        overrides: of the config, beside guidance and number of images.
    """

    config: str
    checkpoint: str
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")] | None
    get: str
    num_images: Annotated[int, msgspec.Meta(ge=2)]
    guidance_scale: FromZero
    guidance_scale_pow: FromZero
    expected: dict[str, Any]
    tolerance: str
    published: str
    overrides: list[str] = []

    @property
    def backend(self) -> str:
        return "efficientnet_lite0" if "frechet_distance" in self.expected else "inception"

    def arguments(self, checkpoint: str) -> list[str]:
        """For the sampler."""
        return [
            f"config={self.config}",
            f"experiment.generator_checkpoint={checkpoint}",
            f"sampling.num_fid_samples={self.num_images}",
            f"model.generator.guidance_scale={self.guidance_scale}",
            f"model.generator.guidance_scale_pow={self.guidance_scale_pow}",
            *self.overrides,
        ]


@dataclass
class Judged:
    """A number beside the expected one; None: not published, without a tolerance, without a verdict."""

    found: float
    expected: float | None
    tolerance: float | None
    right: bool | None


class Content(msgspec.Struct, forbid_unknown_fields=True):
    """Of the file; what is within groups and rows is read one by one, so that an error can name it."""

    reference: Brought
    tolerances: dict[str, dict[str, Any]]
    rows: dict[str, Any]


class RowFile:
    """
    Attributes:
        tolerances: by group and metric; what a group lacks gets no verdict.

    Raises:
        InputError: no such file; an unknown key, or a value that is missing or of another kind, in any row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            loaded = OmegaConf.to_container(OmegaConf.load(path))
        except (OSError, yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
            problem = getattr(error, "problem", None) or first_line(error)
            raise InputError(f"{path}: {problem}") from error
        content: Content = converted(loaded, Content, str(path))
        self.reference = content.reference
        self.tolerances: dict[str, dict[str, Tolerance]] = {
            group: {key: converted(value, Tolerance, f"{path}: tolerances.{group}.{key}") for key, value in of.items()}
            for group, of in content.tolerances.items()
        }
        self.rows = {name: self._row(values, f"{path}: row {name}") for name, values in content.rows.items()}

    def _row(self, values: Any, source: str) -> Row:
        row: Row = converted(values, Row, source)
        metrics = METRICS[row.backend]
        for key in [*row.expected, *metrics]:
            if key not in metrics or key not in row.expected:
                found = "missing (null: not published)" if key in metrics else "unknown"
                raise InputError(f"{source}: expected.{key}: {found}; expected {', '.join(metrics)}")
        for metric, value in row.expected.items():
            row.expected[metric] = converted(value, float | None, f"{source}: expected.{metric}")
        if row.tolerance not in self.tolerances:
            raise InputError(f"{source}: tolerance={row.tolerance}: expected one of {', '.join(self.tolerances)}")
        if all(row.expected.get(metric) is None for metric in self.tolerances[row.tolerance]):
            raise InputError(f"{source}: expected: found no number that has a tolerance in {row.tolerance}")
        return row

    def __getitem__(self, name: str) -> Row:
        """
        Raises:
            InputError: there is none of that name.
        """
        if name not in self.rows:
            raise InputError(f"{self.path}: found no row {name}, expected one of {', '.join(self.rows)}")
        return self.rows[name]

    def judge(self, row: Row, metrics: dict[str, float]) -> dict[str, Judged]:
        """All metrics of the row, in the order of a report."""
        judged = {}
        for metric in METRICS[row.backend]:
            found, expected = metrics[metric], row.expected[metric]
            tolerance = self.tolerances[row.tolerance].get(metric)
            if expected is None or tolerance is None:
                judged[metric] = Judged(found, expected, None, None)
            else:
                allowed = tolerance.relative * abs(expected) + tolerance.absolute
                judged[metric] = Judged(found, expected, allowed, abs(found - expected) <= allowed)
        return judged


def converted(value: Any, kind: Any, source: str) -> Any:
    """
    Raises:
        InputError: an unknown key, or a value that is missing or of another kind.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise InputError(f"{source}: {error}") from error
