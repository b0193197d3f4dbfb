"""The result of a check as a page in Markdown, which can be committed."""

import re
from collections import Counter

from scripts.gpu_checks.findings import FAIL, PASS, SKIPPED, Figure, Finding, Machine


def page(machine: Machine, findings: list[Finding], figures: list[Figure], seconds: float) -> str:
    lines = [f"# {machine.name}", "", "```bash", "bash scripts_bash/gpu_check.sh", "```", ""]
    lines += [f"{summary(findings)} in {seconds:.0f} s.", ""]
    lines += ["| part | result | compared | found | expected |", "|---|---|---|---|---|"]
    lines += [row(finding.part, finding.result, finding.what, finding.found, finding.expected) for finding in findings]
    if machine.gpus == 0:
        lines += ["", "On a CPU all sizes are tiny, and the figures tell nothing of a GPU."]
    lines += ["", "| part | figure | found | goal for reAR-B on one H200 (stretch) |", "|---|---|---|---|"]
    goals = [figure.goal if machine.gpus else "" for figure in figures]
    lines += [row(f.part, f.name, number(f.value), goal) for f, goal in zip(figures, goals, strict=True)]
    return "\n".join(lines) + "\n"


def summary(findings: list[Finding]) -> str:
    counts = Counter(finding.result for finding in findings)
    return ", ".join(f"{counts[result]} {result}" for result in (PASS, FAIL, SKIPPED))


def row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def number(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def line(finding: Finding) -> str:
    """For the console."""
    expected = f" ({finding.expected})" if finding.expected else ""
    what = f" {finding.what}:" if finding.what else ""
    return f"{finding.result:7} {finding.part}:{what} {finding.found}{expected}"


def file_name(machine: Machine) -> str:
    return re.sub(r"\W+", "-", machine.name.lower()).strip("-") + ".md"
