"""The plan of a study: a YAML file, resolved before the first cell and stored with it.

base: configs/rear_blue_marble.yaml
arms:
  lambda_1: {}
  lambda_0.5: {model.generator.transition_alignment_weight: 0.5}
seeds: [1, 2, 3, 4, 5, 6, 7, 8]
hypotheses:
  H1: {arm: lambda_0.5, baseline: lambda_1}
metric: frechet_distance
n: 740
reference: outputs/quickstart/tokenizer/reference.npz
"""

import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml
from msgspec import Meta

from utils.config import Config, TextLoader, flat, load_config
from utils.config_checks import check_training
from utils.errors import InputError, first_line
from utils.files.atomic import write_text_once
from utils.files.hashing import file_sha256, hash_of
from utils.files.json_file import read_json
from utils.files.provenance import differences
from utils.files.text import read_text, user_path
from utils.keys import ConfigError, did_you_mean

Stage = Literal["train", "sample", "evaluate", "sweep"]
NEEDS: dict[Stage, Stage] = {"sample": "train", "evaluate": "sample", "sweep": "train"}
METRICS = {  # of evaluation/report.py, by backend, that have log-ratios: KID can be negative
    "inception": ("inception_score", "fid", "sfid", "precision", "recall"),
    "efficientnet_lite0": ("frechet_distance",),
    "timm": ("frechet_distance",),
}
TUNED = ("tuned/fid", "tuned/frechet_lite0")  # of the sweep; which one depends on the installed weights
# Keys that the study sets for each cell.
OF_THE_CELL = (
    "experiment.output_dir",
    "experiment.generator_checkpoint",
    "experiment.name",
    "experiment.group",
    "experiment.tags",
    "experiment.resume",
    "training.seed",
    "training.stop_steps",
    "sampling.seed",
    "sampling.num_fid_samples",
    "sampling.images_per_class",
)
PLAN_FILE = "plan.json"  # in the folder of the study
ARM_PREFIX = "arm "
MAX_CHANGES = 5  # in an error message

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][\w.+-]*$")]  # of a folder


class Hypothesis(msgspec.Struct, forbid_unknown_fields=True):
    """`arm` differs from `baseline` in the primary metric."""

    arm: str
    baseline: str


class PlanFile(msgspec.Struct, forbid_unknown_fields=True):
    """
    Attributes:
        base: config of all arms.
        arms: config keys of each arm.
        seeds: seeds of training and sampling; the same in every arm.
        hypotheses: what the study tests, by name; everything else is exploratory.
        metric: the primary one, of the evaluator, `val/...` or `tuned/...`.
        n: samples of a cell.
        stages: in this order.
        overrides: config keys of all arms.
        reference: npz of images for the stages evaluate and sweep.
        backend: feature extractor of the stage evaluate, inception, efficientnet_lite0 or timm:NAME[:FILE].
        guidance_scales: scales that the stage sweep tries.
        margin_pct: differences below it do not matter to this study.
        output_dir: folder of the study; None: outputs/studies/<name of the plan file>.
    """

    base: str
    arms: Annotated[dict[Name, dict[str, Any]], Meta(min_length=1)]
    seeds: Annotated[list[Annotated[int, Meta(ge=0, le=2**63 - 1)]], Meta(min_length=2)]
    metric: str
    hypotheses: dict[Name, Hypothesis] = {}
    n: Annotated[int, Meta(ge=2)] | None = None
    stages: Annotated[list[Stage], Meta(min_length=1)] = msgspec.field(
        default_factory=lambda: ["train", "sample", "evaluate"]
    )
    overrides: dict[str, Any] = {}
    reference: str | None = None
    backend: Annotated[str, Meta(pattern="^(inception|efficientnet_lite0|timm:.+)$")] = "inception"
    guidance_scales: list[Annotated[float, Meta(ge=0, le=1000)]] = []
    margin_pct: Annotated[float, Meta(gt=0, lt=100)] = 3.0
    output_dir: str | None = None


class Plan:
    """A checked plan.

    Attributes:
        name: name of the study and of its plan file.
        file: the plan as given.
        folder: folder of the study.
        configs: the resolved config of each arm.
        config_sha256: hash of each arm's config, without the keys of a cell; equal for identical arms.
    """

    def __init__(self, name: str, file: PlanFile) -> None:
        """Raises InputError for a plan that cannot be run."""
        self.name = name
        self.file = file
        self.folder = Path(file.output_dir or f"outputs/studies/{name}")
        self._check_stages()
        self._check_arms()
        self._check_scores()
        self.configs: dict[str, Config] = {arm: self._config_of(arm) for arm in file.arms}
        self.config_sha256 = {arm: hash_of(_deciding(config)) for arm, config in self.configs.items()}

    def arguments(self, arm: str) -> list[str]:
        """The command line of an arm, without the keys of a cell."""
        values = dict(flat(self.file.overrides)) | dict(flat(self.file.arms[arm]))
        more = [] if self.file.n is None else [f"sampling.num_fid_samples={self.file.n}"]
        return [f"config={self.file.base}", *(f"{key}={_to_text(value)}" for key, value in values.items()), *more]

    def resolved(self) -> dict[str, Any]:
        """Everything that the study depends on, by name: the plan, the resolved config of each arm, the reference."""
        without = {"base", "overrides", "arms", "reference", "output_dir"}  # resolved below, or without effect
        given = {key: value for key, value in msgspec.to_builtins(self.file).items() if key not in without}
        facts = dict(flat(given)) | {"arms": list(self.configs)}
        if self.file.reference is not None:
            facts["sha256 of reference"] = file_sha256(Path(self.file.reference), progress=True)
        for arm, config in self.configs.items():
            facts |= {f"{ARM_PREFIX}{arm}: {key}": value for key, value in _deciding(config).items()}
        return facts

    def store(self) -> str:
        """Write plan.json with the first cell, or compare with it; returns the plan's sha256. Raises InputError if the
        plan has changed since."""
        path = self.folder / PLAN_FILE
        if not path.exists():
            facts = self.resolved()
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text_once(path, json.dumps({"plan": facts, "sha256": hash_of(facts)}, indent=1) + "\n")
        return self.check_stored()

    def check_stored(self) -> str:
        """The sha256 in plan.json; raises InputError if it is missing or differs from this plan."""
        path = self.folder / PLAN_FILE
        found = read_json(path)
        changed = _changes(found["plan"], self.resolved())
        if changed:
            more = f" and {len(changed) - MAX_CHANGES} more" if len(changed) > MAX_CHANGES else ""
            raise InputError(
                f"{path}: the plan has changed since the first cell: {'; '.join(changed[:MAX_CHANGES])}{more}; restore "
                "the plan, or copy the new one to a file of another name"
            )
        return found["sha256"]

    def _check_stages(self) -> None:
        stages = self.file.stages
        for index, stage in enumerate(stages):
            if stage in stages[:index]:
                raise InputError(f"stages: found {stage} twice")
            if stage in NEEDS and NEEDS[stage] not in stages[:index]:
                raise InputError(f"stages: found {stage}, expected {NEEDS[stage]} before it")

    def _check_arms(self) -> None:
        file = self.file
        for seed in file.seeds:
            if file.seeds.count(seed) > 1:
                raise InputError(f"seeds: found {seed} twice")
        for name, hypothesis in file.hypotheses.items():
            for arm in (hypothesis.arm, hypothesis.baseline):
                if arm not in file.arms:
                    near = did_you_mean(difflib.get_close_matches(arm, file.arms, 1, 0.3))
                    raise InputError(f"hypotheses.{name}: found no arm {arm!r}{near}")
            if hypothesis.arm == hypothesis.baseline:
                raise InputError(f"hypotheses.{name}: arm and baseline are both {hypothesis.arm}")
        for place, values in {"overrides": file.overrides, **{f"arms.{a}": v for a, v in file.arms.items()}}.items():
            for key, _ in flat(values):
                if key in OF_THE_CELL:
                    raise InputError(f"{place}: found {key}, which the study sets for each cell; remove it")

    def _check_scores(self) -> None:
        file = self.file
        self._check_needed("reference", file.reference, {"evaluate", "sweep"})
        self._check_needed("n", file.n, {"sample", "sweep"})
        self._check_needed("guidance_scales", file.guidance_scales or None, {"sweep"})
        if file.reference is not None and not Path(file.reference).is_file():
            raise InputError(f"reference={file.reference}: no such file")
        known = [*(METRICS[file.backend.partition(":")[0]] if "evaluate" in file.stages else ())]
        known += TUNED if "sweep" in file.stages else ()
        if file.metric not in known and not file.metric.startswith("val/"):
            near = did_you_mean(difflib.get_close_matches(file.metric, known, 1, 0.3))
            raise InputError(f"metric={file.metric}: expected {', '.join([*known, 'val/...'])}{near}")

    def _check_needed(self, key: str, value: Any, by: set[Stage]) -> None:
        users = [stage for stage in self.file.stages if stage in by]
        if users and value is None:
            raise InputError(f"{key}: missing value; the stage {users[0]} needs it")
        if value is not None and not users:
            raise InputError(f"{key}={value}: none of the stages {', '.join(self.file.stages)} reads it; remove it")

    def _config_of(self, arm: str) -> Config:
        try:
            config = load_config([*self.arguments(arm), f"experiment.output_dir={self.folder}"])
            check_training(config)
        except ConfigError as error:
            raise InputError(f"arm {arm}: {error}") from error
        if self.file.metric.startswith("val/") and not config.experiment.eval_every:
            raise InputError(f"arm {arm}: metric={self.file.metric} needs experiment.eval_every above 0")
        return config


def read_plan(words: Sequence[str]) -> tuple[Plan, dict[str, str]]:
    """The plan of a command line such as `["config=configs/studies/tiny.yaml", "n=100", "training.max_train_steps=9"]`:
    keys of the plan, and config keys of all arms. Returns the plan and the words of the keys that it does not have.

    Raises:
        InputError: a missing file, a key that is unknown, or a wrong value.
    """
    pairs = [word.partition("=") for word in words]
    wrong = [word for word, (name, separator, _) in zip(words, pairs, strict=True) if not name or not separator]
    if wrong:
        raise InputError(f"command line: {wrong[0]!r} is not of the form key=value")
    given = {name: value for name, _, value in pairs}
    path = user_path(given.pop("config", ""))
    if not path.is_file():
        raise InputError(f"config={path if path.name else ''}: no such file; give the YAML file of a plan")
    content = _read_yaml(read_text(path), source=str(path))
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping of keys, found a {type(content).__name__}")
    others = {}
    for name, value in given.items():
        if name in PlanFile.__struct_fields__:
            content[name] = _read_yaml(value, source=name)
        elif "." in name:
            content["overrides"] = dict(flat(content.get("overrides") or {})) | {name: value}
        else:
            others[name] = value
    try:
        file = msgspec.convert(content, PlanFile, strict=False)
    except msgspec.ValidationError as error:
        message, _, key = first_line(error).partition(" - at `$.")
        raise InputError(": ".join([str(path), *filter(None, [key.rstrip("`")]), message])) from error
    try:
        return Plan(path.stem, file), others
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _read_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, TextLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{source}{line}: {getattr(error, 'problem', None) or first_line(error)}") from error


def _changes(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """`differences`, without all keys of an arm that was added or removed."""
    in_one_only = tuple(f"{ARM_PREFIX}{arm}: " for arm in {*found["arms"]} ^ {*expected["arms"]})

    def of_common_arms(facts: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in facts.items() if not key.startswith(in_one_only)}

    return differences(of_common_arms(found), expected=of_common_arms(expected))


def _deciding(config: Config) -> dict[str, Any]:
    return {key: value for key, value in flat(asdict(config)) if key not in OF_THE_CELL}


def _to_text(value: Any) -> str:
    """A value as text, as on a command line."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).strip()
