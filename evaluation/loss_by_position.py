"""Picture of the validation loss of each position."""

import numpy as np
from PIL import Image


def draw_loss_by_position(by_position: np.ndarray, code_shape: tuple[int, ...], step: int) -> Image.Image:
    """Losses (N,) in nats per code against their position, and on the grid of the codes if `code_shape` is a grid."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    mean = by_position.mean()
    has_grid = len(code_shape) == 2
    figure = Figure(figsize=(9.6 if has_grid else 5.6, 3.8), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(f"validation loss by position, step {step}: mean {mean:.3f} nats per code", fontsize="medium")
    curve, *grid = figure.subplots(1, 1 + has_grid, squeeze=False, width_ratios=[1.3, 1][: 1 + has_grid])[0]
    curve.plot(range(1, len(by_position) + 1), by_position, linewidth=1)
    curve.axhline(mean, color="grey", linewidth=0.8, linestyle="--", label="mean")
    x_label = "position in raster order" if has_grid else "position (codes without a grid)"
    curve.set(xlabel=x_label, ylabel="nats per code", xlim=(1, len(by_position)))
    curve.legend(frameon=False)
    for axes in grid:
        rows, columns = code_shape
        image = axes.imshow(by_position.reshape(code_shape), extent=(0.5, columns + 0.5, rows + 0.5, 0.5))
        axes.set(xlabel="column", ylabel="row")
        axes.locator_params(integer=True)
        figure.colorbar(image, ax=axes, label="nats per code")
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
