"""The results of a study: a line per cell, the outcome of each hypothesis, and tables.

Only cells and the primary metric that the plan names decide about hypotheses; everything else is exploratory.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from evaluation.studies.statistics import (
    ALPHA,
    POWER,
    Contrast,
    from_percent,
    holm,
    percent,
    seeds_needed,
    smallest_effect,
    smallest_p,
    verdict,
)
from utils.console import markdown_table
from utils.files.atomic import write_text
from utils.studies.cells import CELL_FILE, State, cells_of, read_state
from utils.studies.plan import Hypothesis, Plan

RESULTS_FILE, TABLE_FILE, FIGURE_FILE = "results.jsonl", "table.md", "figure.png"
TYPICAL_SPREADS_PCT = (1.3, 3.0, 5.0)  # between runs of an arm; published for diffusion: 1 to 2 (arXiv 2606.20536)
Values = dict[int, float]  # by seed


@dataclass(frozen=True)
class Outcome:
    """The outcome of a hypothesis.

    Attributes:
        contrast: contrast over the complete pairs; None: fewer than two, or values without ratio.
        seeds: seeds of the complete pairs.
        adjusted_p: Holm's; None: no verdict yet.
        verdict: a sentence.
    """

    name: str
    hypothesis: Hypothesis
    contrast: Contrast | None
    seeds: list[int]
    adjusted_p: float | None
    verdict: str


class Results:
    """The complete cells of a study, read when it is created.

    Attributes:
        states: states of complete planned cells, by arm and seed, in the order of the plan.
        unfinished: names of the other planned cells.
        unplanned: states of other cells in the folder of the study.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        cells = sorted(cells_of(plan), key=lambda cell: list(plan.file.arms).index(cell.arm))
        states = {cell: cell.read() for cell in cells}
        complete = {cell: state for cell, state in states.items() if state.condition == "complete"}
        self.states = {(cell.arm, cell.seed): state for cell, state in complete.items()}
        self.unfinished = [cell.name for cell in cells if cell not in complete]
        planned = {cell.folder / CELL_FILE for cell in cells}
        found = [read_state(path) for path in sorted(plan.folder.glob(f"*/seed*/{CELL_FILE}")) if path not in planned]
        self.unplanned = [state for state in found if state.condition == "complete"]

    def values(self, arm: str, metric: str) -> Values:
        """Values of a metric, by seed, of the complete planned cells that have it."""
        return {
            seed: state.metrics[metric]
            for (of_arm, seed), state in self.states.items()
            if of_arm == arm and metric in state.metrics
        }

    def metrics(self) -> list[str]:
        """All metrics, the primary one first."""
        names = chain.from_iterable(state.metrics for state in self.states.values())
        return list(dict.fromkeys([self.plan.file.metric, *names]))

    def pairs(self, hypothesis: Hypothesis, metric: str) -> list[int]:
        """The seeds for which both arms have the metric."""
        baseline = self.values(hypothesis.baseline, metric)
        return [seed for seed in self.values(hypothesis.arm, metric) if seed in baseline]

    def contrast(self, hypothesis: Hypothesis, metric: str) -> Contrast | None:
        """The contrast over all pairs; None: fewer than two pairs, or values without ratio."""
        arm, baseline = self.values(hypothesis.arm, metric), self.values(hypothesis.baseline, metric)
        seeds = self.pairs(hypothesis, metric)
        if len(seeds) < 2 or min(*arm.values(), *baseline.values()) <= 0:
            return None
        return Contrast.of(
            arm=[arm[seed] for seed in seeds],
            baseline=[baseline[seed] for seed in seeds],
            margin_pct=self.plan.file.margin_pct,
        )

    def confounders(self) -> list[str]:
        """What changed while the study ran, although the plan did not."""
        found = []
        if len({state.weights.get("code") for state in self.states.values()}) > 1:
            found.append("the sources with which the cells were trained")
        for arm in self.plan.file.arms:
            states = [state for (of_arm, _), state in self.states.items() if of_arm == arm]
            if len({(state.weights.get("data"), state.weights.get("tokenizer_sha256")) for state in states}) > 1:
                found.append(f"training data or tokenizer of the cells of {arm}")
        return found

    def outcomes(self) -> list[Outcome]:
        """All outcomes. Hypotheses with incomplete cells get no verdict, and count as p = 1 for Holm's adjustment."""
        file = self.plan.file
        contrasts = {name: self.contrast(hypothesis, file.metric) for name, hypothesis in file.hypotheses.items()}
        seeds = {name: self.pairs(hypothesis, file.metric) for name, hypothesis in file.hypotheses.items()}
        decided = {name: one for name, one in contrasts.items() if one and len(seeds[name]) == len(file.seeds)}
        adjusted = holm([decided[name].p if name in decided else 1.0 for name in contrasts])
        outcomes = []
        for (name, contrast), adjusted_p in zip(contrasts.items(), adjusted, strict=True):
            if name in decided:
                text = self._verdict(decided[name], adjusted_p)
            elif len(seeds[name]) < len(file.seeds):
                text = f"no verdict yet: {len(seeds[name])} of {len(file.seeds)} pairs are complete"
            else:
                text = f"no verdict: {file.metric} is not above 0 in all cells, so there is no ratio"
            outcomes.append(
                Outcome(
                    name=name,
                    hypothesis=file.hypotheses[name],
                    contrast=contrast,
                    seeds=seeds[name],
                    adjusted_p=adjusted_p if name in decided else None,
                    verdict=text,
                )
            )
        return outcomes

    def _verdict(self, contrast: Contrast, adjusted_p: float) -> str:
        file = self.plan.file
        text = verdict(contrast, adjusted_p, file.margin_pct)
        if text != "inconclusive":
            return text
        seeds, alpha = len(file.seeds), ALPHA / len(file.hypotheses)
        effect, what = file.margin_pct, "an effect of"
        needed = seeds_needed(effect, contrast.spread, alpha)
        if needed is not None and needed <= seeds:
            effect, what = abs(contrast.effect_pct), "the effect seen here,"
            needed = seeds_needed(effect, contrast.spread, alpha)
        more = "more than 1,000 seeds" if needed is None else f"{max(needed - seeds, 1)} more seeds"
        return f"inconclusive: finding {what} {effect:.2g} % takes {more}"


def result_lines(results: Results) -> list[dict[str, Any]]:
    """A dict for each complete cell."""
    rows = [(True, state) for state in results.states.values()] + [(False, state) for state in results.unplanned]
    return [_result(state, is_planned) for is_planned, state in rows]


def _result(state: State, is_planned: bool) -> dict[str, Any]:
    return {
        "arm": state.arm,
        "seed": state.seed,
        "planned": is_planned,
        "metrics": state.metrics,
        "config_sha256": state.config_sha256,
        "plan_sha256": state.plan_sha256,
        "weights": state.weights,
        "seconds": round(sum(state.seconds.values()), 1),
    }


def write_results(results: Results) -> None:
    """Write results.jsonl and table.md."""
    folder = results.plan.folder
    write_text(folder / RESULTS_FILE, "".join(json.dumps(row) + "\n" for row in result_lines(results)))
    write_text(folder / TABLE_FILE, table(results))


def table(results: Results) -> str:
    """Markdown: hypotheses, arms, unfinished cells, and what is exploratory."""
    plan, metric = results.plan, results.plan.file.metric
    total = len(plan.file.arms) * len(plan.file.seeds)
    parts = [
        f"# Study {plan.name}",
        f"{len(results.states)} of {total} cells are complete. Primary metric: {metric}.",
    ]
    parts += [f"Warning: {what} differ (`weights` in {RESULTS_FILE})." for what in results.confounders()]
    if plan.file.hypotheses:
        parts += ["## Hypotheses", _hypothesis_table(results), EXPLANATION.format(margin=plan.file.margin_pct)]
    parts += ["## Arms", _arm_table(results)]
    if results.unfinished:
        parts += ["## Cells that are not complete", ", ".join(results.unfinished)]
    if plan.file.hypotheses and (exploratory := _exploratory_table(results)):
        parts += ["## Exploratory: other metrics", EXPLORATORY, exploratory]
    if results.unplanned:
        parts += ["## Exploratory: cells that the plan does not name", _unplanned_table(results)]
    return "\n\n".join(parts) + "\n"


EXPLANATION = (
    "*Effect*: mean over seeds of log(arm / baseline), with its 95 % bootstrap interval. *p*: exact sign-flip test, "
    "two-sided; the next column is adjusted for all hypotheses (Holm) and decides about *real* at 0.05. *TOST p* "
    "decides about *no difference beyond {margin:g} %*."
)
EXPLORATORY = "Not planned, so not adjusted for the number of comparisons: a source of hypotheses for another study."


def _hypothesis_table(results: Results) -> str:
    lines = []
    for outcome in results.outcomes():
        effect, p_values = ["-", "-"], ["-", "-", "-"]
        if outcome.contrast is not None:
            effect = _effect(outcome.contrast)
        if outcome.contrast is not None and outcome.adjusted_p is not None:
            p_values = [_p(outcome.contrast.p), _p(outcome.adjusted_p), _p(outcome.contrast.equivalence_p)]
        names = [outcome.name, _arms(outcome.hypothesis), str(len(outcome.seeds))]
        lines.append([*names, *effect, *p_values, outcome.verdict])
    head = ["hypothesis", "arm vs baseline", "pairs", "effect", "95 % interval", "p", "Holm p", "TOST p", "verdict"]
    return markdown_table(head, lines)


def _arm_table(results: Results) -> str:
    metric = results.plan.file.metric
    lines = []
    for arm in results.plan.file.arms:
        values = list(results.values(arm, metric).values())
        cells = ["-"] * 4
        if values:
            seconds = [sum(state.seconds.values()) for (of_arm, _), state in results.states.items() if of_arm == arm]
            cells = [
                f"{np.mean(values):.5g}",
                "-",
                f"{min(values):.5g} to {max(values):.5g}",
                f"{np.mean(seconds):.0f}",
            ]
        if len(values) > 1 and min(values) > 0:
            cells[1] = f"{percent(float(np.log(values).std(ddof=1))):.2g} %"
        lines.append([arm, str(len(values)), *cells])
    return markdown_table(["arm", "cells", f"mean {metric}", "spread", "range", "seconds per cell"], lines)


def _exploratory_table(results: Results) -> str | None:
    lines = []
    for metric in results.metrics()[1:]:
        for name, hypothesis in results.plan.file.hypotheses.items():
            contrast = results.contrast(hypothesis, metric)
            if contrast is not None:
                pairs = str(len(contrast.differences))
                lines.append([metric, name, _arms(hypothesis), pairs, *_effect(contrast), _p(contrast.p)])
    head = ["metric", "hypothesis", "arm vs baseline", "pairs", "effect", "95 % interval", "p, not adjusted"]
    return markdown_table(head, lines) if lines else None


def _unplanned_table(results: Results) -> str:
    metric = results.plan.file.metric
    lines = [
        [state.arm, str(state.seed), f"{state.metrics.get(metric, float('nan')):.5g}"] for state in results.unplanned
    ]
    return markdown_table(["arm", "seed", metric], lines)


def _arms(hypothesis: Hypothesis) -> str:
    return f"{hypothesis.arm} vs {hypothesis.baseline}"


def _effect(contrast: Contrast) -> list[str]:
    return [f"{contrast.effect_pct:+.2f} %", f"{contrast.low_pct:+.2f} to {contrast.high_pct:+.2f} %"]


def _p(value: float) -> str:
    return f"{value:.2g}"


def cost_and_power(plan: Plan, states: Sequence[State], workers: int) -> list[str]:
    """Lines to read before the start: how much work it is, and how small an effect the seeds can show."""
    file = plan.file
    cells = len(file.arms) * len(file.seeds)
    steps = sum(config.training.max_train_steps for config in plan.configs.values()) * len(file.seeds)
    cost = f"{plan.name}: {len(file.arms)} arms x {len(file.seeds)} seeds = {cells} cells, {steps:,} training steps"
    if file.n is not None:
        settings = ("sample" in file.stages) + len(file.guidance_scales)
        cost += f", {cells * file.n * settings:,} samples"
    durations = [sum(state.seconds.values()) for state in states if state.condition == "complete"]
    if durations:
        seconds = float(np.mean(durations))
        minutes = (cells - len(durations)) * seconds / workers / 60
        cost += f"; {seconds:.0f} s per cell, {minutes:.0f} min for the {cells - len(durations)} that are left"
    return [cost, *power_lines(len(file.seeds), len(file.hypotheses))]


def power_lines(seeds: int, hypotheses: int) -> list[str]:
    """How small an effect `seeds` pairs can show, in words."""
    if hypotheses == 0:
        return ["no hypothesis: everything will be exploratory"]
    alpha = ALPHA / hypotheses
    if smallest_p(seeds) > alpha:
        needed = next(n for n in range(2, 100) if smallest_p(n) <= alpha)
        return [
            f"warning: the smallest p of {seeds} seeds is {smallest_p(seeds):.2g}, above {ALPHA:g} / {hypotheses} "
            f"(number of hypotheses): no verdict can be 'real'; use at least {needed} seeds"
        ]
    # Assumes that the runs of a seed share nothing; what they share makes smaller effects detectable.
    effects = [smallest_effect(from_percent(spread) * 2**0.5, seeds, alpha) for spread in TYPICAL_SPREADS_PCT]
    return [
        f"{seeds} seeds find an effect of {_list(effects, '.1f')} % with a probability of {POWER:.0%}, if the runs of "
        f"an arm spread by {_list(TYPICAL_SPREADS_PCT, 'g')} %"
    ]


def _list(values: Sequence[float], form: str) -> str:
    *first, last = [f"{value:{form}}" for value in values]
    return f"{', '.join(first)} or {last}"
