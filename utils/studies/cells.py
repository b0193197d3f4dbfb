"""A cell of a study: one arm with one seed. Its folder, the commands of its stages, its state and its metrics.

<folder of the study>/<arm>/seed<k>/
    cell.json           state, seconds of each finished stage, metrics when complete
    <stage>.log         output of each stage's command, all attempts
    run/                run folder of training
    samples.npz, ...    files of the sampler, and scores of the evaluator
    sweep/              files of the guidance sweep
"""

import glob
import json
import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from utils.config import ROOT
from utils.errors import InputError
from utils.files.atomic import write_text
from utils.files.json_file import read_json
from utils.files.weights import read_record
from utils.run.metrics_file import METRICS_FILE, read_metrics
from utils.run.weights_path import FINAL_FILE
from utils.studies.plan import Plan, Stage

CELL_FILE = "cell.json"
CHOOSING_HALF, OTHER_HALF = "choosing_half", "other_half"  # of the reference, in sweep.json


@dataclass
class State:
    """The content of cell.json.

    Attributes:
        config_sha256, plan_sha256: hashes of the arm's config and of the plan at the start.
        seconds: duration of each finished stage, all attempts together.
        spent: seconds of attempts of the next stage that did not finish it.
        error: why the last attempt failed; empty: it did not.
        metrics: when all stages are finished.
        weights: provenance of the trained weights then: hashes of code, data, tokenizer and tensors.
    """

    arm: str
    seed: int
    config_sha256: str
    plan_sha256: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    spent: float = 0.0
    error: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)

    @property
    def condition(self) -> Literal["complete", "failed", "unfinished"]:
        return "complete" if self.metrics else "failed" if self.error else "unfinished"


class Cell:
    """
    Attributes:
        name: <arm>/seed<k>.
        folder: folder of its files.
    """

    def __init__(self, plan: Plan, arm: str, seed: int) -> None:
        self.plan = plan
        self.arm = arm
        self.seed = seed
        self.name = f"{arm}/seed{seed}"
        self.folder = plan.folder / arm / f"seed{seed}"

    def read(self) -> State:
        """The state in cell.json; a new one without the file. Raises InputError for a cell of a different config."""
        path, config_sha256 = self.folder / CELL_FILE, self.plan.config_sha256[self.arm]
        if not path.exists():
            return State(self.arm, self.seed, config_sha256)
        state = read_state(path)
        if state.config_sha256 != config_sha256:
            raise InputError(
                f"{path}: is of another config than the plan's arm {self.arm}; delete or rename {self.folder}"
            )
        return state

    def write(self, state: State) -> None:
        write_text(self.folder / CELL_FILE, json.dumps(asdict(state), indent=1) + "\n")

    def next_stage(self, state: State) -> Stage | None:
        return next((stage for stage in self.plan.file.stages if stage not in state.seconds), None)

    def command(self, stage: Stage) -> list[str]:
        """The command of a stage, which continues after an interruption."""
        plan, folder = self.plan, self.folder
        if stage == "evaluate":
            files = [str(plan.file.reference), str(folder / "samples.npz")]
            return [*_script("evaluation/evaluator.py"), *files, "--backend", plan.file.backend]
        arguments = [*plan.arguments(self.arm), f"sampling.seed={self.seed}"]
        weights = f"experiment.generator_checkpoint={folder / 'run'}"
        if stage == "train":
            return [
                *_script("scripts/train_rear.py"),
                *arguments,
                f"training.seed={self.seed}",
                f"experiment.name={plan.name}/{self.name}",
                f"experiment.group={plan.name}/{self.arm}",  # wandb averages over the runs of a group
                f"experiment.tags={json.dumps([plan.name, self.arm])}",
                f"experiment.output_dir={folder / 'run'}",
            ]
        if stage == "sample":
            output = f"experiment.output_dir={folder / 'samples'}"
            return [*_script("scripts/sample_imagenet_rear.py"), *arguments, weights, output]
        return [
            *_script("scripts/sweep_guidance.py"),
            *arguments,
            weights,
            f"experiment.output_dir={folder / 'sweep'}",
            f"sweep.reference={plan.file.reference}",
            f"sweep.guidance_scale={plan.file.guidance_scales}",
        ]

    def weights(self) -> dict[str, Any]:
        """Provenance of the trained weights."""
        return read_record(self.folder / "run" / FINAL_FILE)

    def report_path(self) -> Path:
        """Path of the evaluator's report; for a timm model its name has the hash of the weights. Raises InputError
        unless there is exactly one."""
        kind, model, *_ = [*self.plan.file.backend.split(":"), ""]
        pattern = f"samples.{kind}-{glob.escape(model)}-*.json" if model else f"samples.{kind}.json"
        found = sorted(self.folder.glob(pattern))
        if len(found) != 1:
            raise InputError(f"{self.folder / pattern}: found {len(found)} reports, expected 1")
        return found[0]

    def metrics(self) -> dict[str, float]:
        """All finite metrics of a cell whose stages are finished: of the evaluator, the sweep and the last validation.
        Not training metrics: they are means since the last log line or resume, so they depend on interruptions.

        Raises InputError if the primary metric is not among them.
        """
        stages, metric = self.plan.file.stages, self.plan.file.metric
        found: dict[str, float] = {}
        if "evaluate" in stages:
            found |= read_json(self.report_path())["metrics"]
        if "sweep" in stages:
            found |= tuned_metrics(read_json(self.folder / "sweep/sweep.json"))
        for row in read_metrics(self.folder / "run" / METRICS_FILE):
            found |= {key: value for key, value in row.items() if key.startswith("val/")}
        found = {key: value for key, value in found.items() if math.isfinite(value)}
        if metric not in found:
            raise InputError(f"{self.name}: found no finite metric {metric}, only {', '.join(sorted(found)) or 'none'}")
        return found


def cells_of(plan: Plan) -> list[Cell]:
    """All cells, seed by seed, so that pairs of runs are complete early."""
    return [Cell(plan, arm, seed) for seed in plan.file.seeds for arm in plan.file.arms]


def read_state(path: Path) -> State:
    """Raises InputError for a file that is no cell.json."""
    try:
        return State(**read_json(path))
    except TypeError as error:
        raise InputError(f"{path}: found other keys than those of a cell: {error}") from error


def tuned_metrics(sweep: dict[str, Any]) -> dict[str, float]:
    """Metrics of the setting that one half of the reference selects: its distance to the other half, its guidance."""
    best = min(sweep["settings"], key=lambda row: row[CHOOSING_HALF])
    return {f"tuned/{sweep['distance']}": best[OTHER_HALF], "tuned/guidance_scale": best["guidance_scale"]}


def _script(path: str) -> list[str]:
    return [sys.executable, str(ROOT / path)]
