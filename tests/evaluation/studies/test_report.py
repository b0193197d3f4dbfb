"""Reports on made-up cells: verdicts, tables, the figure."""

import json
from copy import copy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.studies.figure import draw_study
from evaluation.studies.report import Results, cost_and_power, power_lines, result_lines, table, write_results
from tests.utils.studies.stub_study import StubStudy
from utils.errors import InputError
from utils.studies.cells import CELL_FILE, cells_of
from utils.studies.plan import Plan, read_plan

SEEDS = [1, 2, 3, 4, 5, 6, 7, 8]
BASELINE = 50 * np.exp(np.random.default_rng(0).normal(0, 0.03, 8))


@pytest.fixture(scope="module")
def empty_plan(tiny_config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Arms with an effect of -10 %, none at all, a small one, and a wide spread."""
    study = StubStudy(tiny_config_file, tmp_path_factory.mktemp("plan"))
    arms = ("base", "better", "same", "close", "wide")
    study.plan |= {"seeds": SEEDS, "arms": {arm: {} for arm in arms}}
    study.plan["hypotheses"] = {f"H{i}": {"arm": arm, "baseline": "base"} for i, arm in enumerate(arms) if i}
    return read_plan(study.words())[0]


@pytest.fixture
def plan(empty_plan: Plan, tmp_path: Path) -> Plan:
    """With all cells complete."""
    plan = copy(empty_plan)
    plan.folder = tmp_path / "study"
    alternating = np.array([1, -1] * 4)
    values = {
        "base": BASELINE,
        "better": 0.9 * BASELINE * np.exp(0.01 * alternating),
        "same": BASELINE,
        "close": BASELINE * np.exp(0.01 * alternating),
        "wide": BASELINE * np.exp(0.1 * alternating),
    }
    for cell in cells_of(plan):
        state = cell.read()
        state.weights = {"code": "1", "data": "2"}
        state.seconds = {"train": 60.0, "sample": 30.0, "evaluate": 10.0}
        state.metrics = {
            "frechet_distance": values[cell.arm][SEEDS.index(cell.seed)],
            "val/ar_loss": 4.0 + 0.1 * cell.seed + 0.2 * (cell.arm == "better"),
        }
        cell.folder.mkdir(parents=True)
        cell.write(state)
    return plan


def test_verdicts(plan: Plan) -> None:
    outcomes = {outcome.name: outcome for outcome in Results(plan).outcomes()}
    assert outcomes["H1"].verdict == "real: lower"
    assert outcomes["H1"].contrast.effect_pct == pytest.approx(-10, abs=0.01)
    assert outcomes["H1"].contrast.p == 2 / 256
    assert outcomes["H1"].adjusted_p == 4 * 2 / 256  # of four hypotheses
    assert outcomes["H2"].verdict == "no difference beyond 3 %"  # identical: exactly 0
    assert (outcomes["H2"].contrast.effect_pct, outcomes["H2"].contrast.p) == (0, 1)
    assert outcomes["H3"].verdict == "no difference beyond 3 %"
    assert outcomes["H4"].verdict == "inconclusive: finding an effect of 3 % takes 141 more seeds"


def test_missing_cells_delay_verdicts(plan: Plan) -> None:
    """And count as p = 1, so that no verdict that is given changes later."""
    (plan.folder / "wide/seed3" / CELL_FILE).unlink()
    results = Results(plan)
    outcomes = {outcome.name: outcome for outcome in results.outcomes()}
    assert outcomes["H4"].verdict == "no verdict yet: 7 of 8 pairs are complete"
    assert outcomes["H4"].adjusted_p is None
    assert outcomes["H1"].adjusted_p == 4 * 2 / 256
    assert "## Cells that are not complete\n\nwide/seed3" in table(results)
    (plan.folder / "base/seed3" / CELL_FILE).unlink()
    assert {outcome.verdict for outcome in Results(plan).outcomes()} == {"no verdict yet: 7 of 8 pairs are complete"}


def test_values_without_ratio_give_no_verdict(plan: Plan) -> None:
    cell = next(cell for cell in cells_of(plan) if cell.name == "wide/seed3")
    state = cell.read()
    state.metrics["frechet_distance"] = 0.0
    cell.write(state)
    outcome = Results(plan).outcomes()[3]
    assert outcome.verdict == "no verdict: frechet_distance is not above 0 in all cells, so there is no ratio"


def test_files(plan: Plan) -> None:
    results = Results(plan)
    write_results(results)
    rows = [json.loads(line) for line in (plan.folder / "results.jsonl").read_text().splitlines()]
    assert rows == result_lines(results)
    assert [(row["arm"], row["seed"]) for row in rows] == [(arm, seed) for arm in plan.configs for seed in SEEDS]
    assert rows[0] == {
        "arm": "base",
        "seed": 1,
        "planned": True,
        "metrics": {"frechet_distance": BASELINE[0], "val/ar_loss": 4.1},
        "config_sha256": plan.config_sha256["base"],
        "plan_sha256": "",
        "weights": {"code": "1", "data": "2"},
        "seconds": 100.0,
    }
    text = (plan.folder / "table.md").read_text()
    assert "40 of 40 cells are complete. Primary metric: frechet_distance." in text
    assert "| H2 | same vs base | 8 | +0.00 % | +0.00 to +0.00 % | 1 | 1 | 0 | no difference beyond 3 % |" in text
    planned, exploratory = text.split("## Exploratory")
    assert "val/ar_loss" not in planned
    assert "| val/ar_loss | H1 | better vs base | 8 | +4.5" in exploratory


def test_other_cells_are_exploratory(plan: Plan) -> None:
    """An arm and a seed that the plan does not name change no verdict."""
    before = Results(plan).outcomes()
    for name in ("base/seed9", "other/seed1"):
        content = json.loads((plan.folder / "base/seed1" / CELL_FILE).read_text())
        content |= {"arm": name.split("/")[0], "seed": int(name[-1])}
        (plan.folder / name).mkdir(parents=True)
        (plan.folder / name / CELL_FILE).write_text(json.dumps(content))
    results = Results(plan)
    assert [outcome.verdict for outcome in results.outcomes()] == [outcome.verdict for outcome in before]
    assert [row["planned"] for row in result_lines(results)] == [True] * 40 + [False] * 2
    text = table(results).split("## Exploratory: cells that the plan does not name")[1]
    assert f"| base | 9 | {BASELINE[0]:.5g} |" in text
    assert "| other | 1 |" in text


def test_changes_while_the_study_ran_are_reported(plan: Plan) -> None:
    assert "Warning" not in table(Results(plan))
    for key, message in (
        ("code", "the sources with which"),
        ("data", "training data or tokenizer of"),
    ):
        cell = cells_of(plan)[0]
        state = cell.read()
        state.weights[key] = "other"
        cell.write(state)
        assert f"Warning: {message}" in table(Results(plan))


def test_a_cell_of_another_config_is_refused(plan: Plan) -> None:
    path = plan.folder / "same/seed4" / CELL_FILE
    path.write_text(path.read_text().replace(plan.config_sha256["same"], "other"))
    with pytest.raises(InputError, match=r"same/seed4/cell\.json: is of another config than the plan's arm same"):
        Results(plan)


def test_the_figure_shows_every_seed(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn, original = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *args, **style: drawn.append(args) or original(self, *args, **style))
    draw_study(Results(plan), tmp_path / "figure.png")
    values = np.sort(np.concatenate([args[1] for args in drawn[:8]]))
    assert values == pytest.approx(
        np.sort([value.metrics["frechet_distance"] for value in Results(plan).states.values()])
    )
    assert len(drawn) == 8 + 4 * 8
    with Image.open(tmp_path / "figure.png") as picture:
        assert picture.width > picture.height > 300


def test_cost_and_power(plan: Plan) -> None:
    cost, power = cost_and_power(plan, [], workers=2)
    assert cost == "stub: 5 arms x 8 seeds = 40 cells, 1,600 training steps, 320 samples"
    assert power == (
        "8 seeds find an effect of 2.8, 6.6 or 11.1 % with a probability of 80%, if the runs of an arm spread by "
        "1.3, 3 or 5 %"
    )
    states = [cell.read() for cell in cells_of(plan)][:10]
    assert cost_and_power(plan, states, workers=2)[0] == f"{cost}; 100 s per cell, 25 min for the 30 that are left"
    assert "an effect of 2.1, 5.0 or 8.3 %" in power_lines(8, hypotheses=1)[0]
    assert "use at least 6 seeds" in power_lines(5, hypotheses=1)[0]
    assert "use at least 8 seeds" in power_lines(6, hypotheses=5)[0]
    assert power_lines(5, hypotheses=0) == ["no hypothesis: everything will be exploratory"]
