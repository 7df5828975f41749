"""How good a mask is: overlap, surface distance and volume, case by case and label by label.

Empty masks count. A label absent from both masks has no Dice and leaves the mean; a label in one mask only has
Dice 0 and no surface distance, and is reported as missed or invented. Every mean comes with the number of cases in it.
"""

import csv
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer
from scipy.ndimage import find_objects

# Header spacings are float32: without the excess, a shift by one voxel of 1.0000001 mm would be out of tolerance.
_TOLERANCE_MM = 1.001

METRICS = ("dice", "iou", "surface_dice_1mm", "hd95_mm", "asd_mm", "volume_error_ml")


@dataclass(frozen=True)
class LabelScore:
    """One label in one case; nan where a metric is undefined. Counts are voxels."""

    dice: float
    iou: float
    surface_dice_1mm: float  # share of both surfaces, by area, within 1 mm of the other (Nikolov et al. 2021)
    hd95_mm: float  # the larger of the two directed 95th percentiles of surface distance
    asd_mm: float  # mean distance from each surface to the other, over both
    volume_ml: float
    reference_ml: float
    volume_error_ml: float  # absolute
    tp: int
    fp: int
    fn: int

    @property
    def missed(self) -> bool:
        """The reference has the label, the prediction does not."""
        return self.fn > 0 and self.tp + self.fp == 0

    @property
    def invented(self) -> bool:
        """The prediction has the label, the reference does not."""
        return self.fp > 0 and self.tp + self.fn == 0


def score_masks(
    prediction: Integer[np.ndarray, "x y z"],
    reference: Integer[np.ndarray, "x y z"],
    names: dict[int, str],
    spacing_mm: tuple[float, float, float],
) -> dict[int, LabelScore]:
    """Score every label in `names` but the background, 0. Both label maps lie on one grid of `spacing_mm`."""
    if prediction.shape != reference.shape:
        raise ValueError(f"the prediction has shape {prediction.shape}, the reference {reference.shape}")
    values = [value for value in names if value != 0]
    found = [find_objects(label_map, max(values, default=1)) for label_map in (prediction, reference)]
    scores = {}
    for value in values:
        boxes = [boxes[value - 1] for boxes in found if boxes[value - 1] is not None]
        box = tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*boxes, strict=True))
        box = box or (slice(0),) * 3
        scores[value] = _score(prediction[box] == value, reference[box] == value, spacing_mm, prediction.shape)
    return scores


def _score(p: np.ndarray, r: np.ndarray, spacing_mm: tuple[float, float, float], shape: tuple[int, ...]) -> LabelScore:
    tp = int((p & r).sum())
    fp, fn = int(p.sum()) - tp, int(r.sum()) - tp
    voxel_ml = math.prod(map(float, spacing_mm)) / 1000
    surface_dice, hd95_mm, asd_mm = math.nan, math.nan, math.nan
    if tp + fp and tp + fn:
        surface_dice, hd95_mm, asd_mm = _surfaces(p, r, spacing_mm, shape)
    elif fp or fn:
        surface_dice = 0.0
    return LabelScore(
        dice=_ratio(2 * tp, 2 * tp + fp + fn),
        iou=_ratio(tp, tp + fp + fn),
        surface_dice_1mm=surface_dice,
        hd95_mm=hd95_mm,
        asd_mm=asd_mm,
        volume_ml=(tp + fp) * voxel_ml,
        reference_ml=(tp + fn) * voxel_ml,
        volume_error_ml=abs(fp - fn) * voxel_ml,
        tp=tp,
        fp=fp,
        fn=fn,
    )


def _surfaces(
    p: np.ndarray, r: np.ndarray, spacing_mm: tuple[float, float, float], shape: tuple[int, ...]
) -> tuple[float, float, float]:
    """Surface Dice, HD95 and average symmetric surface distance of two masks, neither empty.

    MONAI pads the masks by one voxel, so a mask at the border of the image, or of our box, has a surface there.
    """
    import torch
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice

    spacing = [float(mm) for mm in spacing_mm]
    if 1 in shape:
        # An image of one slice is flat. In 3-D every voxel of it would be surface, which flatters all three metrics.
        flat = shape.index(1)
        p, r = p.squeeze(flat), r.squeeze(flat)
        del spacing[flat]
    y_pred, y = (torch.from_numpy(mask)[None, None] for mask in (p, r))
    options: dict[str, Any] = {"include_background": True, "spacing": spacing}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI 1.6 calls itself with a deprecated argument
        dice = compute_surface_dice(y_pred, y, [_TOLERANCE_MM], use_subvoxels=True, **options)
        hd95_mm = compute_hausdorff_distance(y_pred, y, percentile=95, **options)
        asd_mm = compute_average_surface_distance(y_pred, y, symmetric=True, **options)
    return dice.item(), hd95_mm.item(), asd_mm.item()


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def label_keys(names: Mapping[int, str]) -> dict[int, str]:
    """Label value -> the name that metrics carry, background excluded.

    MLflow takes letters, digits and `_-. `; whatever else becomes `_`, and equal names get their label value behind.
    """
    clean = {value: re.sub(r"[^\w\-. ]", "_", name).strip(" .") for value, name in names.items() if value != 0}
    keys = list(clean.values())
    return {v: name if name and keys.count(name) == 1 else f"{name}_{v}".lstrip("_") for v, name in clean.items()}


def summarize(cases: dict[str, dict[int, LabelScore]], names: dict[int, str]) -> dict:
    """The content of summary.json; None for what is undefined.

    `mean` has, for each metric, `METRIC/LABEL`, the mean over the cases where it is defined, and `METRIC`, the mean of
    these over labels; `n`, the number of cases; `n/dice/LABEL` and `n/hd95_mm/LABEL`, in how many overlap and surface
    distance are defined; `missed/LABEL` and `invented/LABEL`.
    """
    keys = label_keys(names)
    mean: dict[str, float | int | None] = {}
    for metric in METRICS:
        means = []
        for value, key in keys.items():
            values = [getattr(scores[value], metric) for scores in cases.values() if value in scores]
            means.append(_mean(values))
            mean[f"{metric}/{key}"] = _number(means[-1])
            if metric in ("dice", "hd95_mm"):
                mean[f"n/{metric}/{key}"] = sum(not math.isnan(v) for v in values)
        mean[metric] = _number(_mean(means))
    for value, key in keys.items():
        for event in ("missed", "invented"):
            mean[f"{event}/{key}"] = sum(getattr(scores[value], event) for scores in cases.values() if value in scores)
    mean["n"] = len(cases)
    return {
        "mean": mean,
        "cases": [
            {"name": name, "labels": {keys[v]: _fields(score) for v, score in scores.items() if v in keys}}
            for name, scores in cases.items()
        ],
    }


def _fields(score: LabelScore) -> dict[str, float | int | bool | None]:
    numbers = {name: _number(value) for name, value in vars(score).items()}
    return {**numbers, "missed": score.missed, "invented": score.invented}


def _mean(values: list[float]) -> float:
    defined = [v for v in values if not math.isnan(v)]
    return math.fsum(defined) / len(defined) if defined else math.nan


def _number(value: float | int) -> float | int | None:
    return None if math.isnan(value) else value


def write_cases_csv(summary: dict, path: Path) -> None:
    """One line a case and label; an empty cell for what is undefined."""
    rows = [
        {"case": case["name"], "label": label, **fields}
        for case in summary["cases"]
        for label, fields in case["labels"].items()
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys() if rows else ["case", "label"])
        writer.writeheader()
        writer.writerows(rows)


def table(summary: dict) -> str:
    """The means of a summary as text, each with the number of cases, or labels, that it is over."""
    mean = summary["mean"]
    labels = [name.removeprefix("n/dice/") for name in mean if name.startswith("n/dice/")]

    def scores(metric: str) -> list[str]:
        values = [mean[f"{metric}/{label}"] for label in labels] + [mean[metric]]
        return ["-" if value is None else f"{value:.3f}" for value in values]

    def defined(metric: str) -> list[str]:
        counted = sum(mean[f"{metric}/{label}"] is not None for label in labels)
        return [f"{mean[f'n/{metric}/{label}']} of {mean['n']}" for label in labels] + [f"{counted} of {len(labels)}"]

    def events(event: str) -> list[str]:
        counts = [mean[f"{event}/{label}"] for label in labels]
        return [str(count) for count in (*counts, sum(counts))]

    columns = [
        ["label", *labels, "mean over labels"],
        ["Dice", *scores("dice")],
        ["IoU", *scores("iou")],
        ["surface Dice 1 mm", *scores("surface_dice_1mm")],
        ["n of N", *defined("dice")],
        ["HD95 mm", *scores("hd95_mm")],
        ["ASD mm", *scores("asd_mm")],
        ["n of N", *defined("hd95_mm")],
        ["volume error ml", *scores("volume_error_ml")],
        ["missed", *events("missed")],
        ["invented", *events("invented")],
    ]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))])
        for first, *rest in zip(*columns, strict=True)
    )
