"""The page of figures of scripts/analyze.py: a colour per model, and two maps of recovered vectors for each."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.run.curves import plain_label, save_figure

if TYPE_CHECKING:  # a slow import
    from matplotlib.axes import Axes

COLUMNS, PANEL_INCHES = 3, (4.6, 3.1)
LINE_STYLES = {"own": "-", "next": "--", "encoder": ":"}


def draw(figures: dict[str, Any], path: Path) -> None:
    """Write the PNG from the content of analysis.json."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = figures["models"]
    rows = 2 + len(models)
    with rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(COLUMNS * PANEL_INCHES[0], rows * PANEL_INCHES[1]), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, COLUMNS, squeeze=False)
    accuracy, recovered, cka, swapped, entropy, use = grid[:2].flat
    for number, (name, result) in enumerate(models.items()):
        color = f"C{number % 10}"
        _draw_positions(accuracy, result["accuracy"], {"clean": "-", "corrupted": "--"}, color, plain_label(name))
        cosines = {kind: np.mean(values, axis=1) for kind, values in result["recovered_cosine"].items()}
        _draw_layers(recovered, cosines, color)
        _draw_layers(cka, result["cka"], color)
        _draw_swapped(swapped, result, color)
        _draw_positions(entropy, result["prediction_entropy"], {"tokens": "-", "samples": "--"}, color)
        _draw_use(use, result["samples"]["frequencies"], color, f"samples of {plain_label(name)}")
    _draw_use(use, figures["tokens"]["frequencies"], "black", "tokens")
    accuracy.set(title="token accuracy; dashed: corrupted context", xlabel="position")
    recovered.set(title="cosine of recovered codebook vectors", xlabel="block")
    cka.set(title="linear CKA with codebook vectors", xlabel="block")
    swapped.set(title="loss, nats; dashed: by the nearest token", xlabel="share of the context replaced")
    entropy.set(title="entropy of predictions, nats; dashed: samples", xlabel="position")
    use.set(title="frequency of tokens, most frequent first", xlabel="rank")
    recovered.axhline(figures["tokens"]["mean_vector_cosine"], color="0.5", linewidth=0.8, label="mean vector")
    for axes in (recovered, cka):
        for kind in result["cka"] if axes is cka else cosines:
            axes.plot([], [], LINE_STYLES[kind], color="black", label=_meaning(kind))
        axes.legend(frameon=False, fontsize="small")
        axes.locator_params(axis="x", integer=True)
    for axes in (accuracy, use):
        axes.legend(frameon=False, fontsize="small")
    for axes in grid[:2].flat:
        axes.grid(alpha=0.3)
    for (name, result), (own, following, on_grid) in zip(models.items(), grid[2:], strict=True):
        _draw_map(own, result["recovered_cosine"]["own"], f"{plain_label(name)}: recovered vector of the current token")
        _draw_map(following, result["recovered_cosine"]["next"], f"{plain_label(name)}: of the predicted token")
        _draw_on_grid(on_grid, result["accuracy"]["clean"], figures["code_shape"], plain_label(name))
    save_figure(figure, path)


def _meaning(kind: str) -> str:
    return {"own": "current token", "next": "predicted token", "encoder": "encoder features"}[kind]


def _draw_positions(
    axes: "Axes", curves: dict[str, list[float]], styles: dict[str, str], color: str, label: str | None = None
) -> None:
    for number, (name, style) in enumerate(styles.items()):
        positions = range(1, len(curves[name]) + 1)
        axes.plot(positions, curves[name], style, color=color, linewidth=1, label=label if number == 0 else None)


def _draw_layers(axes: "Axes", curves: dict[str, Any], color: str) -> None:
    for kind, values in curves.items():
        axes.plot(range(len(values)), values, LINE_STYLES[kind], color=color, marker=".")


def _draw_swapped(axes: "Axes", result: dict[str, Any], color: str) -> None:
    losses, clean = result["loss_with_swapped_tokens"], float(np.mean(result["loss"]["clean"]))
    for kind, style in (("random", "-"), ("nearest", "--")):
        axes.plot([0, *losses["rates"]], [clean, *losses[kind]], style, color=color, marker=".")


def _draw_use(axes: "Axes", frequencies: list[float], color: str, label: str) -> None:
    used = [value for value in frequencies if value > 0]
    axes.plot(range(1, len(used) + 1), used, color=color, linewidth=1, label=label)
    axes.set_yscale("log")


def _draw_map(axes: "Axes", cosines: list[list[float]], title: str) -> None:
    """Cosines (L, N) by block and position."""
    image = axes.imshow(cosines, aspect="auto", interpolation="nearest", vmin=0, vmax=1, origin="lower")
    axes.set_title(title)
    axes.set(xlabel="position", ylabel="block")
    axes.figure.colorbar(image, ax=axes)
    axes.locator_params(axis="y", integer=True)


def _draw_on_grid(axes: "Axes", accuracy: list[float], code_shape: tuple[int, ...], name: str) -> None:
    if len(code_shape) != 2:
        axes.set_axis_off()
        return
    image = axes.imshow(np.reshape(accuracy, code_shape), interpolation="nearest")
    axes.set_title(f"{name}: accuracy on the grid of tokens")
    axes.figure.colorbar(image, ax=axes)
