"""Compare arms over training seeds: train, sample and score every cell of a plan, and give a verdict.

    python scripts/study.py config=configs/studies/tiny.yaml workers=2
    python scripts/study.py config=configs/studies/tiny.yaml --status
    python scripts/study.py report config=configs/studies/tiny.yaml

The plan (utils/studies/plan.py) names arms as overrides of a base config, seeds, hypotheses and the primary metric.
The first command prints cost and power, runs the cells side by side (by default one for each GPU, or else for each CPU,
with one thread) and reports. Rerun it to resume and to try failed cells again; several such commands share the cells,
also on several machines (scripts_bash/slurm_study.sbatch). --status prints a table of the cells; `report` reports on
those that are complete. Keys of the plan, and config keys for all arms, can be overridden as key=value; a plan that
has changed since the first cell is an error.

Writes to outputs/studies/<name of the plan>: plan.json, <arm>/seed<k>/ (state, logs, run folder, samples and scores of
a cell), results.jsonl (a line per cell), table.md (verdicts) and figure.png. The exit status is 1 if a cell failed, 75
after a stop signal.
"""

import argparse
import difflib
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

from evaluation.studies.figure import draw_study
from evaluation.studies.report import FIGURE_FILE, Results, cost_and_power, table, write_results
from utils.console import markdown_table
from utils.errors import InputError, input_errors_exit
from utils.keys import did_you_mean
from utils.run.status import read_status_or_none
from utils.studies.cells import cells_of
from utils.studies.plan import Plan, PlanFile, read_plan
from utils.studies.runner import Runner, conditions, default_gpus, default_workers


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    arguments = parse_arguments(argv)
    words = [word for word in arguments.words if word != "report"]
    plan, others = read_plan(words)
    gpus = default_gpus()
    workers = default_workers(gpus)
    if "workers" in others:
        workers = read_workers(others.pop("workers"))
    if others:
        unknown = next(iter(others))
        near = difflib.get_close_matches(unknown, [*PlanFile.__struct_fields__, "workers"], 1)
        raise InputError(f"command line: unknown key {unknown!r}{did_you_mean(near)}")
    if arguments.status:
        print_status(plan, workers)
        return 0
    if "report" in arguments.words:
        plan.check_stored()
        report(plan)
        return 0
    return run(plan, workers, gpus)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="report | key=value", help="config=PLAN.yaml, workers=K, keys")
    parser.add_argument("--status", action="store_true", help="print a table of the cells, and run nothing")
    return parser.parse_args(argv)


def read_workers(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise InputError(f"workers={text}: expected a whole number from 1")
    return int(text)


def run(plan: Plan, workers: int, gpus: list[str]) -> int:
    """Run the cells and report if all are complete."""
    plan_sha256 = plan.store()
    print_cost_and_power(plan, workers)
    outcome = Runner(plan, plan_sha256, workers, gpus).run()
    states = conditions(cells_of(plan)).items()
    unfinished = [f"{cell.name} ({condition})" for cell, (_, condition) in states if condition != "complete"]
    if unfinished:
        print(f"not complete: {', '.join(unfinished)}; rerun the same command to resume")
    else:
        report(plan)
    return outcome.exit_status


def report(plan: Plan) -> None:
    results = Results(plan)
    write_results(results)
    draw_study(results, plan.folder / FIGURE_FILE)
    print(table(results), f"look at {plan.folder / FIGURE_FILE}", sep="\n")


def print_cost_and_power(plan: Plan, workers: int) -> None:
    print(*cost_and_power(plan, [cell.read() for cell in cells_of(plan)], workers), sep="\n", flush=True)


def print_status(plan: Plan, workers: int) -> None:
    lines = []
    for cell, (state, condition) in conditions(cells_of(plan)).items():
        stage = cell.next_stage(state)
        detail = state.error
        if condition in ("running", "interrupted") and stage == "train":
            status = read_status_or_none(cell.folder / "run")
            detail = "" if status is None else f"step {status.step}"
        elif condition == "complete":
            detail = f"{plan.file.metric} {state.metrics[plan.file.metric]:.5g}"
        lines.append([cell.name, condition, stage or "-", f"{sum(state.seconds.values()) + state.spent:.0f}", detail])
    print(markdown_table(["cell", "state", "stage", "seconds", ""], lines))
    print_cost_and_power(plan, workers)


if __name__ == "__main__":
    with input_errors_exit():
        raise SystemExit(main())
