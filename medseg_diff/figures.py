"""Figures of training and generation. Drawn without a display, the same bytes for the same content."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from medseg_diff.files import replacing
from medseg_diff.palette import LABEL_COLORS

PALETTE = ("#000000", *LABEL_COLORS)
"""The background is black."""


def draw_curves(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], path: Path) -> None:
    """A panel for each metric, of those that have values; `curves` maps its name to steps and values."""
    shown = {name: curve for name, curve in curves.items() if curve[0]}
    figure = Figure(figsize=(4.2 * max(1, len(shown)), 3.4), layout="constrained")
    for column, (name, (steps, values)) in enumerate(shown.items(), start=1):
        axes = figure.add_subplot(1, len(shown), column)
        axes.plot(steps, values, "o-" if len(steps) < 20 else "-", color=PALETTE[-1], linewidth=1.5, markersize=4)
        axes.set(title=name, xlabel="step", xlim=(0, None))
        if len(values) > 5:  # the first values of a loss would flatten all the others
            axes.set_ylim(top=min(max(values), 1.5 * float(np.percentile(values, 95))))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def draw_strip(rows: Sequence[Sequence[tuple[str, np.ndarray]]], aspect: float, path: Path) -> None:
    """Pictures in rows, each with its caption: gray [height, width] or coloured [height, width, 3].

    `aspect` is the height of a pixel over its width.
    """
    height, width = rows[0][0][1].shape[:2]
    inches = 2.4
    size = (inches * len(rows[0]), len(rows) * (inches * aspect * height / width + 0.35))
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for axes, (caption, picture) in zip(grid.flat, [panel for row in rows for panel in row], strict=True):
        axes.imshow(picture, cmap="gray", interpolation="nearest", extent=(0, width, height, 0), aspect=aspect)
        axes.set_title(caption, fontsize=10)
        axes.set_axis_off()
    _save(figure, path)


def draw_grid(images: Float[Tensor, "count *space"], path: Path) -> None:
    """Generated images side by side; of volumes, the middle slice."""
    slices = [np.rot90(_middle(image.numpy())) for image in images]
    columns = int(np.ceil(np.sqrt(len(slices))))
    rows = -(-len(slices) // columns)
    low, high = np.percentile(np.stack(slices), [0.5, 99.5])
    shape = slices[0].shape
    canvas = np.full((rows * (shape[0] + 2) + 2, columns * (shape[1] + 2) + 2), low, np.float32)
    for index, picture in enumerate(slices):
        y, x = 2 + index // columns * (shape[0] + 2), 2 + index % columns * (shape[1] + 2)
        canvas[y : y + shape[0], x : x + shape[1]] = picture
    scale = max(1, round(900 / max(canvas.shape)))
    figure = Figure(figsize=(canvas.shape[1] * scale / 100, canvas.shape[0] * scale / 100), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(canvas, cmap="gray", vmin=low, vmax=high, interpolation="bicubic", aspect="auto")
    axes.set_axis_off()
    _save(figure, path)


def colours(probability: Float[np.ndarray, "classes rows columns"]) -> Float[np.ndarray, "rows columns 3"]:
    """A soft mask as a mixture of its labels' colours."""
    palette = np.array([to_rgb(PALETTE[index % len(PALETTE)]) for index in range(len(probability))])
    return np.clip(np.einsum("krc,kd->rcd", probability, palette), 0, 1)


def _middle(image: np.ndarray) -> np.ndarray:
    return image if image.ndim == 2 else image[..., image.shape[-1] // 2]


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, metadata={"Software": None})
