"""The ten validation cases that a model segments worst, looked at: writes docs/worst.md and docs/worst.png.

    .venv/bin/python benchmarks/worst_cases.py --data FOLDER

FOLDER is the data set of the model. The reported masks are those of `medseg-diff evaluate`, to the voxel.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from nibabel.orientations import apply_orientation

from medseg_diff.checkpoint import Model, find_model, load_model
from medseg_diff.datasets.layouts import Case, read_dataset
from medseg_diff.device import choose_device
from medseg_diff.ensemble import LabelReport
from medseg_diff.evaluate import choose_cases
from medseg_diff.figures import save_figure
from medseg_diff.metrics import LabelScore, score_masks
from medseg_diff.scans.preview import PLANES, View, choose_view, contours, window
from medseg_diff.scans.read import read_label_map, read_scan
from medseg_diff.scans.write import label_colors
from medseg_diff.segmentation import sample_frames, segment_scan

ROOT = Path(__file__).resolve().parents[1]
WORST, DRAWN = 10, 8
REFERENCE = "#FFFFFF"


@dataclass(frozen=True)
class Look:
    """A case and what was made of it; all maps lie on the scan's grid."""

    name: str
    image: np.ndarray
    affine: np.ndarray
    reference: np.ndarray
    reported: np.ndarray
    samples: np.ndarray
    labels: tuple[LabelReport, ...]
    scores: dict[int, LabelScore]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="hippocampus")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/worst")
    options = parser.parse_args()
    summary = evaluated(options.model, options.data.resolve(), options.work.resolve())
    print(write_worst(options.model, options.data, summary))


def evaluated(model: str, data: Path, work: Path) -> dict[str, Any]:
    """The summary of `medseg-diff evaluate` on the validation cases; beside it in `work` lies cases.csv."""
    work.mkdir(parents=True, exist_ok=True)
    command = ["evaluate", "--model", str(find_model(model, "segment")[0].resolve()), "--data", str(data), "--out", "."]
    subprocess.run([sys.executable, "-m", "medseg_diff", *command], cwd=work, check=True)
    return json.loads((work / "summary.json").read_text())


def write_worst(name: str, data: Path, summary: dict[str, Any]) -> str:
    """Draws and describes the cases of the lowest mean Dice; returns the page."""
    model = load_model(find_model(name, "segment")[0], choose_device())
    cases = choose_cases(read_dataset(data), model, "val")
    dice = {case["name"]: mean(label["dice"] for label in case["labels"].values()) for case in summary["cases"]}
    order = sorted(range(len(cases)), key=lambda index: dice[cases[index].name])[:WORST]
    looks = [look(model, cases[index], index) for index in order]
    draw(looks, model.about.labels, ROOT / "docs/worst.png")
    text = page(looks, len(cases))
    (ROOT / "docs/worst.md").write_text(text)
    return text


def look(model: Model, case: Case, seed: int) -> Look:
    """Segments a case as `evaluate` does and keeps every sampled mask."""
    settings, scan = model.about.config.segment, read_scan(case.image, len(model.about.channels))
    with tempfile.TemporaryDirectory() as folder:
        keep = Path(folder)
        found = segment_scan(model, scan, samples=settings.samples, steps=settings.steps, seed=seed, keep=keep)
        samples = np.stack(list(sample_frames(found, list(model.about.labels), scan)))
    reference = read_label_map(case.labels[0])[0]
    scores = score_masks(found.label_map, reference, model.about.labels, scan.spacing_mm)
    image, labels = scan.array[0], found.labels
    return Look(case.name, image, scan.affine, reference, found.label_map, samples, labels, scores)


def sentence(case: Look) -> str:
    """What went wrong, in numbers: volumes against their intervals, and of which kind the wrong voxels are."""
    parts = []
    for label in case.labels:
        score, text = case.scores[label.value], f"{label.name} {label.volume_ml:.2f} ml"
        if label.volume_ml_interval90 is not None:
            low, high = label.volume_ml_interval90
            inside = "inside" if low <= score.reference_ml <= high else "**outside**"
            text += f" ({low:.2f} to {high:.2f} plausible), reference {score.reference_ml:.2f}, {inside}"
        expected = "" if label.expected_dice is None else f" where {label.expected_dice:.2f} was expected"
        parts.append(f"{text}, Dice {score.dice:.2f}{expected}")
    wrong = case.reported != case.reference
    count = int(wrong.sum())
    swapped = (wrong & (case.reported > 0) & (case.reference > 0)).sum() / max(count, 1)
    missed = (wrong & (case.reported == 0)).sum() / max(count, 1)
    known = (case.samples == case.reference).any(0)[wrong].mean() if count else 0.0
    parts.append(
        f"of {count} wrong voxels {swapped:.0%} take one label for another, {missed:.0%} are missed,"
        f" {1 - swapped - missed:.0%} added; one sample of {len(case.samples)} at least is right in {known:.0%} of them"
    )
    return "; ".join(parts) + "."


def draw(cases: Sequence[Look], names: dict[int, str], path: Path) -> None:
    """Two cases a row, each where most voxels are wrong: the reported mask, then samples, with the reference."""
    foreground = {value: name for value, name in names.items() if value}
    colors, white = label_colors(foreground), dict.fromkeys(foreground, REFERENCE)
    rows = math.ceil(len(cases) / 2)
    figure = Figure(figsize=(10.4, 3.3 * rows + 0.4), facecolor="black", layout="constrained")
    grid = figure.subplots(rows, 4, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for index, case in enumerate(cases):
        view, pair = worst_view(case), grid[index // 2, 2 * (index % 2) :]
        at = view.slices[0]
        image, reference = view.cut(case.image, at), view.cut(case.reference, at)
        low, high = window(image[None], reference[None])
        size_mm = image.shape[1] * view.pixel_mm[0], image.shape[0] * view.pixel_mm[1]
        for axes, masks, line, strength in (
            (pair[0], [case.reported], 1.8, ""),
            (pair[1], case.samples[:DRAWN], 0.7, "B0"),
        ):
            extent = (0, size_mm[0], size_mm[1], 0)
            axes.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="bicubic", extent=extent, aspect="equal")
            for mask in masks:
                faded = {value: color + strength for value, color in colors.items()}
                contours(axes, view.cut(mask, at), view.pixel_mm, faded, line)
            contours(axes, reference, view.pixel_mm, white, 1.1)
        dice = mean(score.dice for score in case.scores.values())
        plane = f"{PLANES[view.axis][0].lower()} slice {at + 1} of {view.count}"
        pair[0].set_title(f"{index + 1}  {case.name}, Dice {dice:.2f}", color="white", size=11, loc="left")
        pair[1].set_title(f"{DRAWN} samples, {plane}", color="0.7", size=11, loc="left")
    keys = [("reference", REFERENCE), *((name, colors[value]) for value, name in foreground.items())]
    lines = [Line2D([], [], color=color, label=name, linewidth=2) for name, color in keys]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False, labelcolor="white")
    save_figure(figure, path, dpi=120)


def worst_view(case: Look) -> View:
    """The plane that shows most of the structures, at the slice with most wrong voxels."""
    there = ((case.reported > 0) | (case.reference > 0)).astype(np.uint8)
    view = choose_view(there, None, case.affine)
    wrong = apply_orientation(case.reported != case.reference, view.orientation)
    at = int(wrong.sum(tuple({0, 1, 2} - {view.axis})).argmax())
    return View(view.orientation, view.axis, [at], view.count, view.box, view.pixel_mm)


def page(cases: Sequence[Look], count: int) -> str:
    items = "\n".join(f"{index}. **{case.name}**: {sentence(case)}" for index, case in enumerate(cases, start=1))
    return f"""# The worst cases

The {len(cases)} of {count} validation cases with the lowest mean Dice, each in the slice where most voxels are wrong:
on the left the reported mask, on the right {DRAWN} of the samples, both with the reference in white. Axial slices
have the front at the top and the patient's right on the left, sagittal ones the front on the left.

![The worst validation cases with their contours](worst.png)

{items}

Made by `.venv/bin/python benchmarks/worst_cases.py --data FOLDER`.
"""


def mean(values: Any) -> float:
    """Over what is defined; nan of nothing."""
    defined = [value for value in values if value is not None and not math.isnan(value)]
    return math.fsum(defined) / len(defined) if defined else math.nan


if __name__ == "__main__":
    main()
