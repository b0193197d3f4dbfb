"""The first ten minutes on a GPU: does everything compute there what it should, and how fast is it?

    bash scripts_bash/gpu_check.sh [OUT] [--parts NAME ...]
    python scripts/gpu_check.py outputs/gpu_check --parts model graphs

Runs each part in a process of its own with a time limit and goes on after a failure; environment is always the first.
On a machine without a GPU all is done on the CPU in tiny sizes. Needs a checkout (tests/fixtures), no network and no
files to bring.

Writes OUT/gpu_check.md (a table to be committed as docs/benchmarks/<device>.md), OUT/gpu_check.json and
OUT/logs/<part>.log. The exit status is 1 if anything failed.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project's root: no PYTHONPATH, from any directory

from scripts.gpu_checks import environment, numerics, sampling, speed, training
from scripts.gpu_checks.findings import FAIL, Figure, Finding, Findings, Machine, read_findings
from scripts.gpu_checks.processes import Check, run_part
from scripts.gpu_checks.table import file_name, line, page, summary
from utils.errors import input_errors_exit
from utils.files.atomic import write_text

TOTAL_S = 600
PARTS: dict[str, tuple[Check, float]] = {  # in this order, with limits in seconds
    "environment": (environment.environment, 60),
    "model": (numerics.model_parity, 60),
    "tokenizer": (numerics.tokenizer_parity, 120),
    "bf16": (numerics.bfloat16, 60),
    "graphs": (sampling.graphs, 180),
    "batches": (sampling.batches, 90),
    "ranks": (sampling.ranks, 120),
    "decoder": (sampling.decoder, 60),
    "evaluator": (numerics.evaluator_parity, 120),
    "training": (training.training, 180),
    "copies": (training.copies, 90),
    "two-ranks": (training.two_ranks, 150),
    "memory": (training.memory, 120),
    "roofline": (speed.roofline, 60),
    "speed-sampling": (speed.sampling, 240),
    "speed-decode": (speed.decode, 90),
    "speed-training": (speed.training, 90),
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=Path("outputs/gpu_check"), metavar="OUT")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="these only")
    arguments = parser.parse_args(argv)
    out: Path = arguments.out.resolve()
    (out / "logs").mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="work-", dir=out))
    machine, start = Machine("unknown", 0, 0), time.monotonic()
    findings: list[Finding] = []
    figures: list[Figure] = []
    for name, (check, limit) in PARTS.items():
        if name not in ("environment", *arguments.parts):
            continue
        found = Findings(name, scratch / "findings.jsonl")
        left = TOTAL_S - (time.monotonic() - start)
        print(f"== {name}", flush=True)
        if left < 1:
            found.skip("", f"{TOTAL_S} s are over")
        else:
            work = scratch / name
            work.mkdir()
            started = time.monotonic()
            run_part(check, found, machine, work, out / f"logs/{name}.log", min(limit, left))
            found.figure("took, s", time.monotonic() - started)
            shutil.rmtree(work)
        new_findings, new_figures = read_findings(found.path)
        found.path.unlink()
        for finding in new_findings:
            print(line(finding), flush=True)
        findings, figures = findings + new_findings, figures + new_figures
        if name == "environment":
            machine = environment.machine_of(figures)
            print(machine.name)
    shutil.rmtree(scratch)
    seconds = time.monotonic() - start
    write_text(out / "gpu_check.md", page(machine, findings, figures, seconds))
    rows = {"findings": list(map(asdict, findings)), "figures": list(map(asdict, figures))}
    write_text(out / "gpu_check.json", json.dumps({"machine": asdict(machine), "seconds": seconds, **rows}, indent=1))
    print(f"{summary(findings)}: {out / 'gpu_check.md'}")
    if machine.gpus:
        print(f"to keep it: docs/benchmarks/{file_name(machine)}, with a link in README.md")
    return int(any(finding.result == FAIL for finding in findings))


if __name__ == "__main__":
    with input_errors_exit():
        raise SystemExit(main(sys.argv[1:]))
