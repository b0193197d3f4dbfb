"""The generated parts of docs/ are those that docs/generate.py writes: the page of all keys, the schedules' figures."""

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from tests.docs.pages import ROOT
from utils.config import SCRIPT_SECTIONS
from utils.keys import keys_of
from utils.schema import Config, ParamGroupConfig, TapConfig

GENERATE = runpy.run_path(str(ROOT / "docs/generate.py"))
AGAIN = "run python docs/generate.py and commit what it writes"


def test_the_page_of_keys_is_the_generated_one() -> None:
    assert (ROOT / "docs/config.md").read_text() == GENERATE["config_page"](), AGAIN


def test_the_page_has_every_key_with_a_meaning() -> None:
    assert {*GENERATE["SECTIONS_OF_SCRIPTS"]} == {*SCRIPT_SECTIONS}
    sections = [Config, TapConfig, ParamGroupConfig, *GENERATE["SECTIONS_OF_SCRIPTS"].values()]
    names = [key.name.rpartition(".")[2] for section in sections for key in keys_of(section).values()]
    rows = re.findall(r"^\| `(\w+)` \| \S.* \| \S.* \| \S.* \|$", (ROOT / "docs/config.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(names)


def texts(path: Path) -> list[str]:
    """The labels of a figure: the rest differs between versions of matplotlib."""
    return re.findall(r">([^<>]+)</text>", path.read_text())


@pytest.mark.parametrize("name", ["noise_schedule", "guidance_schedule"])
def test_the_figures_are_the_generated_ones(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.svg"
    GENERATE[f"draw_{name}"](path)
    assert len(texts(path)) > 10
    assert texts(ROOT / f"docs/figures/{name}.svg") == texts(path), AGAIN


def drawn(draw: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """The values of all curves, by panel."""
    figures: list[Figure] = []
    monkeypatch.setitem(draw.__globals__, "save", lambda figure, path: figures.append(figure))
    draw(Path("unused"))
    return [[line.get_ydata() for line in axes.get_lines()] for axes in figures[0].axes]


def test_the_noise_schedule_is_that_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    ratio, [rate] = drawn(GENERATE["draw_noise_schedule"], monkeypatch)
    steps = (0, 25, 50, 75, 100)  # percent of 250,000
    assert [round(ratio[0][step], 6) for step in steps] == [1, 0.666667, 0.333333, 0, 0]
    assert [round(ratio[1][step], 6) for step in steps] == [0.5, 0.333333, 0.166667, 0, 0]
    assert [round(rate[step], 9) for step in (0, 25, 100)] == [0, 4e-4, 1e-5]


def test_guidance_grows_from_1_to_its_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    published, exponents = drawn(GENERATE["draw_guidance_schedule"], monkeypatch)
    for scales, largest in zip(published, (14.5, 10, 6.9), strict=True):
        assert (scales[0], len(scales)) == (1, 256)
        assert 0.99 * largest < scales[-1] < largest
    assert set(exponents[0]) == {4}
    at_half = [scales[128] for scales in exponents]
    assert at_half == sorted(at_half, reverse=True)
