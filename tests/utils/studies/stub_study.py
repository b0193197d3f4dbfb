"""A study whose stages are `stub_stage.py`."""

import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import yaml

from scripts.study import main
from tests.processes import SERVER, STARTED
from utils.errors import input_errors_exit
from utils.studies.cells import Cell
from utils.studies.plan import Stage

STUB = Path(__file__).with_name("stub_stage.py")


class StubStudy:
    """
    Attributes:
        plan: as in the YAML file.
        folder: of the study.
        control: of the stages' behaviour.
    """

    def __init__(self, base: Path, folder: Path) -> None:
        self.root = folder
        self.folder = folder / "study"
        self.control = folder / "control"
        self.control.mkdir()
        np.savez(folder / "reference.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8))
        self.plan = {
            "base": str(base),
            "arms": {"ar": {"model.generator.perturb_mode": "none"}, "rear": {}},
            "seeds": [1, 2],
            "hypotheses": {"H1": {"arm": "rear", "baseline": "ar"}},
            "metric": "frechet_distance",
            "n": 8,
            "reference": str(folder / "reference.npz"),
            "backend": "efficientnet_lite0",
            "output_dir": str(self.folder),
        }

    def words(self, *more: str) -> list[str]:
        path = self.root / "stub.yaml"
        path.write_text(yaml.safe_dump(self.plan, sort_keys=False))
        return [f"config={path}", *more]

    def command(self, cell: Cell, stage: Stage) -> list[str]:
        options = ["-S", "-E"]  # a fast start
        return [
            sys.executable,
            *options,
            str(STUB),
            str(self.control),
            cell.arm,
            str(cell.seed),
            stage,
            str(cell.folder),
        ]

    def start(self, *more: str) -> BaseProcess:
        """In a process of its own; the output goes to <root>/output."""
        process = SERVER.Process(target=_be_study, args=(self, self.words(*more)))
        process.start()
        STARTED.append(process)
        return process

    def calls(self) -> list[str]:
        """<arm>.<seed>.<stage> of each start of a stage."""
        path = self.control / "calls"
        return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def use_stub(study: StubStudy) -> None:
    Cell.command = lambda cell, stage: study.command(cell, stage)  # type: ignore[method-assign]


def _be_study(study: StubStudy, words: list[str]) -> None:
    sys.stdout = sys.stderr = (study.root / "output").open("a", buffering=1)
    use_stub(study)
    with input_errors_exit():
        raise SystemExit(main(words))
