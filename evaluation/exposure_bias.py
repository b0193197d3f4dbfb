"""Exposure bias of a student q that learns a known distribution p, the teacher: estimates, arms, table and figure.

Definitions of Arora et al. 2022 (https://arxiv.org/abs/2204.01171), with the teacher as oracle: the error at a position
is KL(p || q) of the next token given the context. Its sum over positions is the forward KL if contexts are the
teacher's, and the accumulated error of free running if they are the student's. The difference is the excess error,
which teacher forcing cannot see.

Legend: n pairs of sequences, one of each model, with the same class and random numbers; N codes each. Values in nats.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from evaluation.studies.statistics import bootstrap_interval, log_ratios, percent, sign_flip_p
from utils.console import markdown_table
from utils.run.curves import plain_label, save_figure
from utils.run.run_config import CELL

if TYPE_CHECKING:  # a slow import
    from matplotlib.axes import Axes

QUANTITIES = ("forward_kl", "reverse_kl", "excess_error")  # of a student, each [mean, low, high]


def interval(values: np.ndarray) -> list[float]:
    """Mean and its 95 % t-interval [mean, low, high], of independent values (n,)."""
    mean, error = values.mean(), values.std(ddof=1) / np.sqrt(len(values))
    half_width = stats.t.ppf(0.975, len(values) - 1) * error
    return [float(mean), float(mean - half_width), float(mean + half_width)]


def summarize(forward: np.ndarray, free_running: np.ndarray, reverse: np.ndarray) -> dict[str, Any]:
    """The estimates of a student, for its JSON. Means are over sequences, sums over positions.

    Args:
        forward: (n, N) KL(p || q) on contexts of the teacher.
        free_running: (n, N) KL(p || q) on contexts of the student; row i is paired with row i of `forward`.
        reverse: (n, N) KL(q || p) on contexts of the student.
    """
    excess = (free_running - forward).cumsum(1)  # (n, N)
    accumulated = [interval(column) for column in excess.T]
    total = float(forward.sum(1).mean())
    return {
        "forward_kl": interval(forward.sum(1)),
        "reverse_kl": interval(reverse.sum(1)),
        "excess_error": accumulated[-1],
        "excess_error_pct": 100 * accumulated[-1][0] / total if total > 0 else 0.0,  # of the forward KL
        "by_position": {
            "forward_kl": forward.mean(0).tolist(),
            "free_running_kl": free_running.mean(0).tolist(),
            "reverse_kl": reverse.mean(0).tolist(),
            "accumulated_excess_error": accumulated,
        },
    }


@dataclass(frozen=True)
class Arm:
    """Students of one arm of a study, by seed; any other student is an arm of its own."""

    name: str
    students: dict[int, dict[str, Any]]

    def curves(self, name: str) -> np.ndarray:
        """(number of seeds, N) of `by_position`."""
        curves = np.array([student["by_position"][name] for student in self.students.values()])
        return curves[..., 0] if curves.ndim == 3 else curves

    def excess_band(self) -> np.ndarray:
        """(3, N): mean, low and high of the accumulated excess error, over seeds, or over sequences for one student."""
        if len(self.students) == 1:
            (student,) = self.students.values()
            return np.array(student["by_position"]["accumulated_excess_error"]).T
        return np.array([interval(column) for column in self.curves("accumulated_excess_error").T]).T


def arms_of(students: dict[str, dict[str, Any]]) -> list[Arm]:
    """Arms in the order of their first student.

    Args:
        students: results of `summarize` by name; `<arm>/seed<k>` is a cell of a study.
    """
    arms: dict[str, Arm] = {}
    for name, result in students.items():
        cell = CELL.fullmatch(name)
        arm, seed = (cell[1], int(cell[2])) if cell else (name, 0)
        arms.setdefault(arm, Arm(arm, {})).students[seed] = result
    return list(arms.values())


def report(students: dict[str, dict[str, Any]], entropy: Sequence[float]) -> str:
    """Tables in Markdown: each student, and the paired differences of arms that share two or more seeds with the first.

    Args:
        entropy: the teacher's, in nats per sequence, [mean, low, high].
    """
    lines = [
        [name, *(_with_interval(student[quantity]) for quantity in QUANTITIES), f"{student['excess_error_pct']:.1f} %"]
        for name, student in students.items()
    ]
    head = ["student", "forward KL(p, q)", "reverse KL(q, p)", "excess error", "of the forward KL"]
    parts = [f"teacher's entropy: {_with_interval(entropy)} nats per sequence", markdown_table(head, lines)]
    baseline, *others = arms_of(students)
    contrasts = [line for arm in others for line in _contrasts(arm, baseline)]
    if contrasts:
        head = ["arm", "quantity", "seeds", "difference", "95 % interval over seeds", "p, not adjusted"]
        parts.append(markdown_table(head, contrasts))
    return "\n\n".join(parts)


def _with_interval(values: Sequence[float]) -> str:
    mean, low, high = values
    return f"{mean:.4f} [{low:.4f}, {high:.4f}]"


def _contrasts(arm: Arm, baseline: Arm) -> list[list[str]]:
    seeds = [seed for seed in arm.students if seed in baseline.students]
    if len(seeds) < 2:
        return []
    lines = []
    for quantity in QUANTITIES:
        ours, theirs = ([one.students[seed][quantity][0] for seed in seeds] for one in (arm, baseline))
        is_ratio = quantity != "excess_error"  # which may be negative
        differences = log_ratios(ours, theirs) if is_ratio else np.subtract(ours, theirs)
        effect, low, high = map(
            percent if is_ratio else float, (float(differences.mean()), *bootstrap_interval(differences))
        )
        unit = "%" if is_ratio else "nats"
        numbers = [f"{effect:+.3f} {unit}", f"{low:+.3f} to {high:+.3f} {unit}", f"{sign_flip_p(differences):.3g}"]
        lines.append([f"{arm.name} against {baseline.name}", quantity, str(len(seeds)), *numbers])
    return lines


def draw(students: dict[str, dict[str, Any]], path: Path) -> None:
    """Write the figure, a colour per arm: error by position, accumulated excess error, and both divergences."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    arms = arms_of(students)
    with rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(13.5, 4), layout="constrained")
        FigureCanvasAgg(figure)
        by_position, excess, totals = figure.subplots(1, 3)
        for number, arm in enumerate(arms):
            _draw_arm(arm, f"C{number % 10}", by_position, excess, totals)
    by_position.set(title="KL(p || q) of the next token", xlabel="position", ylabel="nats")
    by_position.plot([], [], "k-", label="contexts of the teacher")
    by_position.plot([], [], "k--", label="contexts of the student")
    excess.axhline(0, color="0.5", linewidth=0.8)
    excess.set(title="accumulated excess error, 95 % interval", xlabel="position", ylabel="nats")
    limits = totals.get_xlim(), totals.get_ylim()  # of the points: the diagonal does not widen the panel
    totals.axline((0, 0), slope=1, color="0.7", linewidth=0.8, zorder=0)
    totals.set(xlim=limits[0], ylim=limits[1])
    totals.set(
        title="per sequence, 95 % intervals over sequences", xlabel="forward KL(p || q)", ylabel="reverse KL(q || p)"
    )
    for axes in (by_position, excess, totals):
        axes.grid(alpha=0.3)
    by_position.legend(frameon=False)
    excess.legend(frameon=False)
    save_figure(figure, path)


def _draw_arm(arm: Arm, color: str, by_position: "Axes", excess: "Axes", totals: "Axes") -> None:
    positions = np.arange(1, arm.curves("forward_kl").shape[1] + 1)
    by_position.plot(positions, arm.curves("forward_kl").mean(0), "-", color=color, linewidth=1)
    by_position.plot(positions, arm.curves("free_running_kl").mean(0), "--", color=color, linewidth=1)
    mean, low, high = arm.excess_band()
    excess.fill_between(positions, low, high, color=color, alpha=0.2, linewidth=0)
    excess.plot(positions, mean, color=color, label=plain_label(arm.name))
    for student in arm.students.values():
        (x, *x_ends), (y, *y_ends) = student["forward_kl"], student["reverse_kl"]
        x_error, y_error = ([[at - low], [high - at]] for at, (low, high) in ((x, x_ends), (y, y_ends)))
        totals.errorbar(x, y, y_error, x_error, fmt="o", color=color, markersize=4, linewidth=1)
