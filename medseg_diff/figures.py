"""Figures of training and generation. Drawn without a display, the same bytes for the same content."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float, Integer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from medseg_diff.files import replacing
from medseg_diff.palette import LABEL_COLORS

PALETTE = ("#000000", *LABEL_COLORS)
"""The background is black."""

LINE_COLORS = (*(color for color in reversed(LABEL_COLORS) if color != "#F0E442"), "#000000")
"""Without the yellow, which is faint on white."""

Curves = Mapping[str, tuple[Sequence[float | int], Sequence[float | int]]]


@dataclass(frozen=True)
class Panel:
    """Curves of one quantity over another.

    Attributes:
        curves: x and y by name; the same name has the same colour in every panel.
        dashed: more of them, drawn dashed.
        log: the axes with a logarithmic scale: "", "x", "y" or "xy"; that of x is to base 2, marked where curves are.
        ylim: the range of y, where that of the curves says too little.

    """

    title: str
    xlabel: str
    ylabel: str
    curves: Curves
    dashed: Curves = field(default_factory=dict)
    log: str = ""
    ylim: tuple[float, float] | None = None


def draw_lines(panels: Sequence[Panel], path: Path, *, solid: str = "", dashed: str = "") -> None:
    """Panels side by side, one legend at their right; `solid` and `dashed` say in it what the two strokes mean."""
    names = list(dict.fromkeys(name for panel in panels for name in (*panel.curves, *panel.dashed)))
    colors = {name: LINE_COLORS[index % len(LINE_COLORS)] for index, name in enumerate(names)}
    figure = Figure(figsize=(4.6 * len(panels) + 1.8, 3.8), layout="constrained", facecolor="white")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        for curves, stroke in ((panel.curves, "-"), (panel.dashed, "--")):
            for name, (x, y) in curves.items():
                axes.plot(x, y, stroke, color=colors[name], linewidth=1.8, marker="o" if len(x) < 20 else "", ms=5)
        axes.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
        if "x" in panel.log:
            ticks = sorted({value for x, _ in (*panel.curves.values(), *panel.dashed.values()) for value in x})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        if "y" in panel.log:
            axes.set_yscale("log")
        if panel.ylim:
            axes.set_ylim(panel.ylim)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    keys = [*((name, "-", color) for name, color in colors.items()), (solid, "-", "0.4"), (dashed, "--", "0.4")]
    lines = [axes.plot([], [], stroke, color=color, label=text)[0] for text, stroke, color in keys if text]
    figure.legend(handles=lines, loc="outside right center", frameon=False)
    save_figure(figure, path, dpi=150)


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
    save_figure(figure, path)


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
    save_figure(figure, path)


def draw_grid(
    images: Float[Tensor, "count *space"], path: Path, masks: Integer[Tensor, "count *space"] | None = None
) -> None:
    """Generated images side by side; of volumes, the middle slice. Label indices in `masks` tint them."""
    slices = np.stack([np.rot90(_middle(image.numpy())) for image in images])
    low, high = np.percentile(slices, [0.5, 99.5])
    pictures = np.clip((slices - low) / (high - low or 1.0), 0, 1)[..., None].repeat(3, -1)
    if masks is not None:
        labels = np.stack([np.rot90(_middle(mask.numpy())) for mask in masks])
        tints = np.array([to_rgb(PALETTE[index % len(PALETTE)]) for index in range(labels.max() + 1)])[labels]
        pictures = np.where(labels[..., None] > 0, 0.6 * pictures + 0.4 * tints, pictures)
    columns = int(np.ceil(np.sqrt(len(pictures))))
    rows = -(-len(pictures) // columns)
    height, width = pictures.shape[1:3]
    canvas = np.zeros((rows * (height + 2) + 2, columns * (width + 2) + 2, 3))
    for index, picture in enumerate(pictures):
        y, x = 2 + index // columns * (height + 2), 2 + index % columns * (width + 2)
        canvas[y : y + height, x : x + width] = picture
    scale = max(1, round(900 / max(canvas.shape)))
    figure = Figure(figsize=(canvas.shape[1] * scale / 100, canvas.shape[0] * scale / 100), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(canvas, interpolation="bicubic", aspect="auto")
    axes.set_axis_off()
    save_figure(figure, path)


def colours(probability: Float[np.ndarray, "classes rows columns"]) -> Float[np.ndarray, "rows columns 3"]:
    """A soft mask as a mixture of its labels' colours."""
    palette = np.array([to_rgb(PALETTE[index % len(PALETTE)]) for index in range(len(probability))])
    return np.clip(np.einsum("krc,kd->rcd", probability, palette), 0, 1)


def _middle(image: np.ndarray) -> np.ndarray:
    return image if image.ndim == 2 else image[..., image.shape[-1] // 2]


def save_figure(figure: Figure, path: Path, dpi: int = 100) -> None:
    """As a PNG, whole or not at all, without a date."""
    FigureCanvasAgg(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=dpi, metadata={"Software": None})
