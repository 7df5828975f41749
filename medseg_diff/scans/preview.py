"""One picture that shows a radiologist what was segmented, and where it may be wrong."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from jaxtyping import Float, Integer
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from medseg_diff.files import replacing
from medseg_diff.scans.geometry import spacing_of
from medseg_diff.scans.write import label_colors

WIDTH, PANEL_HEIGHT, SIDE, GAP, TOP, DPI = 1600.0, 560.0, 270.0, 16.0, 92.0, 100.0  # pixels, but for the last
INK, FAINT, EDGE = "#F2F2F2", "#A8A8A8", "#3A3A3A"
HEAT = ScalarMappable(Normalize(0, 0.5, clip=True), "inferno")
PLANES = (("Sagittal", "APSI"), ("Coronal", "RLSI"), ("Axial", "RLAP"))  # slice axis -> name; left, right, top, bottom
SHADOW = [withStroke(linewidth=2.5, foreground="black")]
LISTED = 12


@dataclass(frozen=True)
class View:
    """How volumes are cut: turned to RAS, across `axis`, at `slices`, cropped to `box` of the other two axes."""

    orientation: np.ndarray
    axis: int
    slices: list[int]
    count: int
    box: tuple[slice, slice]
    pixel_mm: tuple[float, float]

    def cut(self, volume: np.ndarray, index: int) -> np.ndarray:
        """One slice as rows and columns, the patient's right or front at the left, superior or anterior at the top."""
        turned = nib.orientations.apply_orientation(volume, self.orientation)
        return turned.take(index, self.axis)[self.box].T[::-1, ::-1]


def draw_preview(
    image: Float[np.ndarray, "x y z"],
    label_map: Integer[np.ndarray, "x y z"],
    uncertainty: Float[np.ndarray, "x y z"] | None,
    affine: Float[np.ndarray, "4 4"],
    names: dict[int, str],
    path: Path,
    title: str,
) -> None:
    """Writes a PNG of up to three slices with contours, in radiological orientation, the uncertainty below each."""
    view = choose_view(label_map, uncertainty, affine)
    shown = [view.cut(image, index) for index in view.slices]
    low, high = window(np.array(shown), np.array([view.cut(label_map, index) for index in view.slices]))
    width_mm, height_mm = shown[0].shape[1] * view.pixel_mm[0], shown[0].shape[0] * view.pixel_mm[1]
    columns, rows = len(shown), 1 if uncertainty is None else 2
    scale = min((WIDTH - SIDE - GAP * (columns + 1)) / columns / width_mm, PANEL_HEIGHT / height_mm)
    width, height = max(scale * width_mm, 60.0), max(scale * height_mm, 60.0)
    side = 2 * GAP + columns * (width + GAP)
    total = np.array([side + SIDE, max(TOP + rows * (height + GAP), 420)])
    figure = Figure((total[0] / DPI, total[1] / DPI), DPI, facecolor="black")

    def place(left: float, top: float, width: float, height: float) -> Axes:
        return figure.add_axes((left / total[0], 1 - (top + height) / total[1], width / total[0], height / total[1]))

    def write(left: float, top: float, text: str, color: str = INK, size: float = 12.0, **more: Any) -> None:
        x, y = left / total[0], 1 - top / total[1]
        figure.text(x, y, text, color=color, size=size, va="center", parse_math=False, **more)

    def draw(left: float, top: float, picture: np.ndarray, **more: Any) -> Axes:
        axes = place(left, top, width, height)
        axes.imshow(picture, interpolation="bicubic", extent=(0, width_mm, height_mm, 0), aspect="auto", **more)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color(EDGE)
        return axes

    colors = label_colors(names)
    plane, marks = PLANES[view.axis]
    room = int(total[0] / 16)
    write(GAP, 30.0, title if len(title) <= room else title[: room - 1] + "…", size=18.0, weight="bold")
    for column, index in enumerate(view.slices):
        left, masks = GAP + column * (width + GAP), view.cut(label_map, index)
        write(left + width / 2, TOP - 16, f"{plane}, slice {index + 1} of {view.count}", FAINT, ha="center")
        axes = draw(left, TOP, shown[column], cmap="gray", vmin=low, vmax=high)
        contours(axes, masks, view.pixel_mm, colors, 2.0)
        _marks(axes, marks)
        if column == 0:
            _scale_bar(axes, width_mm, height_mm)
        if uncertainty is not None:
            axes = draw(left, TOP + height + GAP, view.cut(uncertainty, index), cmap=HEAT.cmap, norm=HEAT.norm)
            contours(axes, masks, view.pixel_mm, dict.fromkeys(colors, INK), 0.8)
    for line, (name, volume, color) in enumerate(_legend(label_map, affine, names, colors)):
        top = TOP + 14 + 26 * line
        write(side, top, "■", color, 18.0)
        write(side + 26, top, name)
        write(total[0] - GAP, top, volume, FAINT, ha="right")
    if uncertainty is not None:
        bar = figure.colorbar(HEAT, cax=place(side, TOP + height + GAP, 18.0, height), extend="max")
        bar.ax.tick_params(color=FAINT, labelcolor=INK, labelsize=11)
        bar.set_label("probability that the label is wrong", color=INK, size=12)
        bar.outline.set_visible(False)
    with warnings.catch_warnings(action="ignore"), replacing(path) as temporary:  # of glyphs that the font lacks
        FigureCanvasAgg(figure).print_png(temporary, metadata={"Software": None})


def choose_view(label_map: np.ndarray, uncertainty: np.ndarray | None, affine: np.ndarray) -> View:
    """The acquired plane, or for nearly isotropic voxels the one that shows most foreground in a slice.

    Slices lie at 1/6, 1/2 and 5/6 of the foreground; without any, of the uncertainty; without that, of the volume.
    """
    orientation = nib.io_orientation(affine)
    order = np.argsort(orientation[:, 0])
    spacing = np.array(spacing_of(affine))[order]
    weight = label_map > 0
    if not weight.any() and uncertainty is not None:
        weight = uncertainty
    if not weight.any():
        weight = np.broadcast_to(True, label_map.shape)
    weight = nib.orientations.apply_orientation(weight, orientation)
    along = [weight.sum(tuple({0, 1, 2} - {axis})) for axis in range(3)]
    if spacing.max() > 1.5 * spacing.min():
        axis = int(spacing.argmax())
    else:
        axis = max((2, 0, 1), key=lambda a: along[a].max() / spacing[a])
    if 1 in weight.shape:
        axis = weight.shape.index(1)
    share = np.cumsum(along[axis]) / along[axis].sum()
    slices = sorted({int(np.searchsorted(share, part)) for part in (1 / 6, 1 / 2, 5 / 6)})
    others = [a for a in range(3) if a != axis]
    box = tuple(_around(np.flatnonzero(along[a]), weight.shape[a]) for a in others)
    return View(
        orientation, axis, slices, weight.shape[axis], (box[0], box[1]), (spacing[others[0]], spacing[others[1]])
    )


def _around(indices: np.ndarray, size: int) -> slice:
    """The range of the indices, and as much again on either side: a small structure fills a third of the picture."""
    extent = int(indices[-1] - indices[0]) + 1
    margin = max(extent, 16)
    return slice(max(int(indices[0]) - margin, 0), min(int(indices[-1]) + margin + 1, size))


def window(shown: np.ndarray, masks: np.ndarray) -> tuple[float, float]:
    """Black and white: what the slices span, but no wider than thrice the contrast within what was found."""
    low, high = np.percentile(shown, (1, 99.5))
    if masks.any():
        dark, bright = np.percentile(shown[masks > 0], (1, 99))
        margin = max(bright - dark, (high - low) / 10)
        low, high = max(low, dark - margin), min(high, bright + margin)
    return float(low), float(max(high, np.nextafter(low, np.inf)))


def contours(axes: Axes, masks: np.ndarray, pixel_mm: tuple[float, float], colors: dict[int, str], line: float) -> None:
    """Draws the outline of every label onto a picture whose axes are in mm."""
    limits = axes.get_xlim(), axes.get_ylim()
    x, y = ((np.arange(-1, n + 1) + 0.5) * mm for n, mm in zip(masks.shape[::-1], pixel_mm, strict=True))
    for value, color in colors.items():
        if (masks == value).any():
            axes.contour(x, y, np.pad(masks == value, 1), [0.5], colors=[color], linewidths=line)
    axes.set(xlim=limits[0], ylim=limits[1])


def _marks(axes: Axes, letters: str) -> None:
    places = (
        (0.02, 0.5, "left", "center"),
        (0.98, 0.5, "right", "center"),
        (0.5, 0.98, "center", "top"),
        (0.5, 0.02, "center", "bottom"),
    )
    for letter, (x, y, ha, va) in zip(letters, places, strict=True):
        axes.text(
            x, y, letter, transform=axes.transAxes, ha=ha, va=va, color=INK, size=14, weight="bold", path_effects=SHADOW
        )


def _scale_bar(axes: Axes, width_mm: float, height_mm: float) -> None:
    length = max((mm for mm in (1, 2, 5, 10, 20, 50, 100) if mm < width_mm / 3), default=None)
    if length is not None:
        left, low = 0.04 * width_mm, 0.95 * height_mm
        axes.plot([left, left + length], [low, low], color=INK, linewidth=3, solid_capstyle="butt", path_effects=SHADOW)
        axes.text(
            left + length / 2,
            low - 0.015 * height_mm,
            f"{length} mm",
            color=INK,
            size=11,
            ha="center",
            va="bottom",
            path_effects=SHADOW,
        )


def _legend(
    label_map: np.ndarray, affine: np.ndarray, names: dict[int, str], colors: dict[int, str]
) -> list[tuple[str, str, str]]:
    """Name, volume and colour of every label, or, where labels are many, of those that were found."""
    counts = {value: np.count_nonzero(label_map == value) for value in colors}
    listed = [value for value in colors if counts[value] or len(colors) <= LISTED]
    voxel_ml = abs(np.linalg.det(affine[:3, :3])) / 1000
    lines = []
    for value in listed[:LISTED]:
        name = names[value] if len(names[value]) <= 16 else names[value][:15] + "…"
        lines.append((name, f"{counts[value] * voxel_ml:.3g} ml" if counts[value] else "not found", colors[value]))
    return lines if len(listed) <= LISTED else [*lines, (f"and {len(listed) - LISTED} more", "", "black")]
