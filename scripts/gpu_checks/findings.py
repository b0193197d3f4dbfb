"""What a part of the check finds: comparisons with their bounds, and figures."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

PASS, FAIL, SKIPPED = "PASS", "FAIL", "SKIPPED"


class SkippedError(Exception):
    """A part cannot run here. The message is the reason."""


@dataclass(frozen=True)
class Machine:
    """
    Attributes:
        gpus: that this process sees; 0: all is done on the CPU, in tiny sizes.
        memory: bytes of the first GPU.
    """

    name: str
    gpus: int
    memory: int


@dataclass
class Finding:
    part: str
    result: str  # PASS, FAIL or SKIPPED
    what: str  # is compared
    found: str  # of SKIPPED: the reason
    expected: str = ""


@dataclass
class Figure:
    part: str
    name: str
    value: float | str
    goal: str = ""


class Findings:
    """Appends each finding to a file as it comes, so that those of a part that crashes are not lost."""

    def __init__(self, part: str, path: Path) -> None:
        self.part, self.path = part, path

    def _write(self, row: Finding | Figure) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({type(row).__name__: asdict(row)}) + "\n")

    def holds(self, what: str, found: object, expected: object, passed: bool) -> None:
        self._write(Finding(self.part, PASS if passed else FAIL, what, str(found), str(expected)))

    def at_most(self, what: str, found: float, bound: float) -> None:
        self.holds(what, f"{found:.3g}", f"at most {bound:g}", found <= bound)  # NaN fails

    def at_least(self, what: str, found: float, bound: float) -> None:
        self.holds(what, f"{found:.4g}", f"at least {bound:g}", found >= bound)

    def no_difference(self, what: str, differing: int, total: int) -> None:
        self.holds(what, f"{differing} of {total} differ", "0", differing == 0)

    def fail(self, what: str, found: str) -> None:
        self.holds(what, found, "", False)

    def skip(self, what: str, reason: str) -> None:
        self._write(Finding(self.part, SKIPPED, what, reason))

    def figure(self, name: str, value: float | str, goal: str = "") -> None:
        self._write(Figure(self.part, name, value, goal))


def read_findings(path: Path) -> tuple[list[Finding], list[Figure]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    findings = [Finding(**row["Finding"]) for row in rows if "Finding" in row]
    return findings, [Figure(**row["Figure"]) for row in rows if "Figure" in row]
