"""Check a new GPU in ten minutes: correctness and speed.

    bash scripts_bash/gpu_check.sh [OUT] [--parts NAME ...]
    python scripts/gpu_check.py outputs/gpu_check --parts model graphs

Runs the checks of tests/gpu/checks with pytest, each in its own process with a time limit, so that a crash or hang does
not affect the others. Without a GPU they run on the CPU in tiny sizes. Needs a checkout and pytest
(requirements-dev.txt), no network and no downloaded files.

Writes OUT/gpu_check.md (a table to be committed as docs/benchmarks/<device>.md), OUT/gpu_check.json and
OUT/logs/<part>.log. The exit status is 1 if anything failed.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

from utils.config import ROOT
from utils.console import markdown_table, markdown_text
from utils.errors import InputError, input_errors_exit
from utils.files.atomic import write_text
from utils.files.text import user_path

TOTAL_S = 600
CHECKS = "tests/gpu/checks"
PARTS: dict[str, tuple[str, float]] = {  # test and time limit in seconds, in this order
    "environment": (f"{CHECKS}/test_numerics.py::test_environment", 60),
    "model": (f"{CHECKS}/test_numerics.py::test_model", 60),
    "tokenizer": (f"{CHECKS}/test_numerics.py::test_tokenizer", 120),
    "bf16": (f"{CHECKS}/test_numerics.py::test_bf16", 60),
    "attention": (f"{CHECKS}/test_numerics.py::test_attention", 60),
    "graphs": (f"{CHECKS}/test_sampling.py::test_graphs", 180),
    "batches": (f"{CHECKS}/test_sampling.py::test_batches", 90),
    "ranks": (f"{CHECKS}/test_sampling.py::test_ranks", 120),
    "decoder": (f"{CHECKS}/test_sampling.py::test_decoder", 60),
    "evaluator": (f"{CHECKS}/test_numerics.py::test_evaluator", 120),
    "training": (f"{CHECKS}/test_training.py::test_training", 180),
    "copies": (f"{CHECKS}/test_training.py::test_copies", 90),
    "two-ranks": (f"{CHECKS}/test_training.py::test_two_ranks", 150),
    "memory": (f"{CHECKS}/test_training.py::test_memory", 120),
    "roofline": (f"{CHECKS}/test_speed.py::test_roofline", 60),
    "speed-sampling": (f"{CHECKS}/test_speed.py::test_speed_sampling", 240),
    "speed-decode": (f"{CHECKS}/test_speed.py::test_speed_decode", 90),
    "speed-training": (f"{CHECKS}/test_speed.py::test_speed_training", 90),
    "prediction": (f"{CHECKS}/test_speed.py::test_prediction", 120),
}
PASS, FAIL, SKIPPED = "PASS", "FAIL", "SKIPPED"
ENDS = "runs to its end"
Row = dict[str, Any]  # part, result, what, found, expected of a comparison; part, name, value, goal of a figure


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=user_path, default=Path("outputs/gpu_check"), metavar="OUT")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these, and environment")
    arguments = parser.parse_args(argv)
    if find_spec("pytest") is None:
        raise InputError("scripts/gpu_check.py: pytest is not installed: pip install -r requirements-dev.txt")
    out: Path = arguments.out.resolve()
    (out / "logs").mkdir(parents=True, exist_ok=True)
    comparisons: list[Row] = []
    figures: list[Row] = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="work-", dir=out, ignore_cleanup_errors=True) as work:
        for part in PARTS:
            if part not in ("environment", *arguments.parts):
                continue
            print(f"== {part}", flush=True)
            part_start = time.monotonic()
            found = run_part(part, Path(work) / part, out / f"logs/{part}.log", TOTAL_S - (part_start - start))
            comparisons += [{"part": part, **row} for row in found if "what" in row]
            figures += [{"part": part, **row} for row in found if "name" in row]
            took = time.monotonic() - part_start
            figures.append({"part": part, "name": "took, s", "value": took, "goal": ""})
            for row in found:
                if "what" in row:
                    print(f"{row['result']:7} {row['what'] or part}: {row['found']}", flush=True)
    values = {figure["name"]: figure["value"] for figure in figures if figure["part"] == "environment"}
    device, on_gpu = str(values.get("device", "unknown")), bool(values.get("GPUs"))
    counts = Counter(row["result"] for row in comparisons)
    summary = ", ".join(f"{counts[result]} {result}" for result in (PASS, FAIL, SKIPPED))
    seconds = time.monotonic() - start
    write_text(out / "gpu_check.md", page(device, on_gpu, f"{summary} in {seconds:.0f} s.", comparisons, figures))
    result = {"device": device, "seconds": seconds, "findings": comparisons, "figures": figures}
    write_text(out / "gpu_check.json", json.dumps(result, indent=1))
    print(f"{summary}: {out / 'gpu_check.md'}")
    if on_gpu:
        file = re.sub(r"\W+", "-", device.lower()).strip("-") + ".md"
        print(f"to keep it, copy it to docs/benchmarks/{file}, with a link in README.md")
    return int(counts[FAIL] > 0)


def run_part(part: str, work: Path, log: Path, seconds_left: float) -> list[Row]:
    """Comparisons and figures of a part. Its files go to `work`, which is removed, and its output to `log`;
    `seconds_left` is the remaining time of the whole check."""
    test, limit = PARTS[part]
    limit = min(limit, seconds_left)
    if limit < 1:
        return [comparison(SKIPPED, "", f"{TOTAL_S} s are over")]
    results = work.with_suffix(".xml")
    command = [sys.executable, "-m", "pytest", test, "-m", "gpu", "-s", "-p", "no:cacheprovider"]
    command += [f"--junitxml={results}", f"--basetemp={work}"]
    devices = {"TESTS_ON_GPU": "1", "GPU_CHECKS_ON_CPU": "1"}  # on the CPU only if there is no GPU
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | devices, stdout=output, stderr=output, start_new_session=True
        )
        try:
            process.wait(limit)
            ending = f"ended by {signal.Signals(-process.returncode).name}" if process.returncode < 0 else None
        except subprocess.TimeoutExpired:
            ending = f"still running after {limit:.0f} s, killed"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and its children
            process.wait()
    shutil.rmtree(work, ignore_errors=True)
    rows = read_results(results) if results.exists() else []
    if ending is None and process.returncode != 0 and not any(row.get("result") == FAIL for row in rows):
        ending = f"pytest ended with exit status {process.returncode}"
    if ending is not None:
        rows.append(comparison(FAIL, ENDS, f"{ending}; see logs/{log.name}"))
    return rows


def read_results(junit: Path) -> list[Row]:
    """Results of a part's tests, from `tests.gpu.checks.conftest.Report` and pytest."""
    rows = []
    for case in ElementTree.parse(junit).iter("testcase"):
        rows += [json.loads(item.get("value", "")) for item in case.iter("property")]
        if (skip := case.find("skipped")) is not None:
            rows.append(comparison(SKIPPED, "", skip.get("message", "")))
        for problem in case.iter("failure"):  # an exception; failed comparisons are an `error` and a property
            rows.append(comparison(FAIL, ENDS, problem.get("message", "").partition("\n")[0]))
    return rows


def comparison(result: str, what: str, found: str) -> Row:
    return {"result": result, "what": what, "found": found, "expected": ""}


def page(device: str, on_gpu: bool, summary: str, comparisons: list[Row], figures: list[Row]) -> str:
    """The table in Markdown."""
    compared = [cells(row["part"], row["result"], row["what"], row["found"], row["expected"]) for row in comparisons]
    measured = [cells(row["part"], row["name"], row["value"], row["goal"] if on_gpu else "") for row in figures]
    note = "" if on_gpu else "On a CPU all sizes are tiny, and the figures say nothing about a GPU.\n\n"
    return (
        f"# {markdown_text(device)}\n\n```bash\nbash scripts_bash/gpu_check.sh\n```\n\n{summary}\n\n"
        + markdown_table(["part", "result", "compared", "found", "expected"], compared)
        + f"\n\n{note}"
        + markdown_table(["part", "figure", "found", "goal for reAR-B on one H200 (stretch)"], measured)
        + "\n"
    )


def cells(*values: object) -> list[str]:
    return [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]


if __name__ == "__main__":
    with input_errors_exit():
        raise SystemExit(main(sys.argv[1:]))
