"""Checks of a GPU's numerics, marked `gpu`; scripts/gpu_check.py runs them and writes a table (docs/gpu.md).

TESTS_ON_GPU=1 python -m pytest -m gpu tests/gpu/checks
GPU_CHECKS_ON_CPU=1 python -m pytest -m gpu tests/gpu/checks    # in tiny sizes, to test the checks
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.gpu.checks.made_up import ON_GPU, make_project


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if ON_GPU or "GPU_CHECKS_ON_CPU" in os.environ:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU and TESTS_ON_GPU=1, or GPU_CHECKS_ON_CPU=1"))


class Report:
    """What a check finds: comparisons with their bounds, and figures.

    Each is a property of the test in pytest's JUnit file, from which scripts/gpu_check.py reads it.
    """

    def __init__(self, record_property: Callable[[str, object], None]) -> None:
        self._record_property = record_property
        self.failed: list[str] = []

    def compare(self, what: str, found: object, expected: object, passed: bool) -> None:
        """A comparison that fails lets the check continue, and fails it at its end."""
        row = {"result": "PASS" if passed else "FAIL", "what": what, "found": str(found), "expected": str(expected)}
        self._record("comparison", row)
        if not passed:
            self.failed.append(f"{what}: found {found}, expected {expected}")

    def at_most(self, what: str, found: float, bound: float) -> None:
        self.compare(what, f"{found:.3g}", f"at most {bound:g}", found <= bound)  # NaN fails

    def at_least(self, what: str, found: float, bound: float) -> None:
        self.compare(what, f"{found:.4g}", f"at least {bound:g}", found >= bound)

    def no_difference(self, what: str, differing: int, total: int) -> None:
        self.compare(what, f"{differing} of {total} differ", "0", differing == 0)

    def skip(self, what: str, reason: str) -> None:
        self._record("comparison", {"result": "SKIPPED", "what": what, "found": reason, "expected": ""})

    def figure(self, name: str, value: float | str, goal: str = "") -> None:
        """
        Args:
            goal: for reAR-B on one H200, in brackets a stretch goal.
        """
        self._record("figure", {"name": name, "value": value, "goal": goal})

    def _record(self, kind: str, row: dict[str, object]) -> None:
        print(kind, row, flush=True)  # a crash loses the JUnit file, not this line
        self._record_property(kind, json.dumps(row))


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Iterator[Report]:
    report = Report(record_property)
    yield report
    if report.failed:
        pytest.fail("\n".join(report.failed), pytrace=False)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # results are compared bit for bit, and they depend on the number of threads


@pytest.fixture
def project(tmp_path: Path) -> list[str]:
    """Command line of a training project in tmp_path, without `experiment.output_dir`."""
    return make_project(tmp_path)
