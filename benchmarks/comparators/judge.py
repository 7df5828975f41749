"""All that is measured of a method's predictions. The measures are those of the package."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch

from comparators.protocol import Prediction
from medseg_diff.datasets.cache import Volume
from medseg_diff.ensemble import Tally, agreement
from medseg_diff.metrics import label_keys, score_masks
from medseg_diff.uncertainty.calibration import Calibration, expected_dice, rank_correlation
from medseg_diff.uncertainty.diversity import sample_measures
from medseg_diff.uncertainty.volumes import volume_measures


def judge(
    found: Iterable[tuple[Volume, Prediction]], names: dict[int, str], spacing_mm: tuple[float, float, float]
) -> dict[str, Any]:
    """`measures` over the data set, and `cases` with MEASURE/LABEL each; everything on the network's grid."""
    calibration, cases = Calibration(), []
    for volume, (probabilities, samples) in found:
        calibration.add(probabilities, volume.labels[0].numpy())
        cases.append({"name": volume.name, **judge_case(probabilities, samples, volume, names, spacing_mm)})
    return {
        "measures": {**vars(calibration.measures()), **means(cases, list(label_keys(names).values()))},
        "cases": cases,
    }


def judge_case(
    probabilities: np.ndarray,
    samples: np.ndarray | None,
    volume: Volume,
    names: dict[int, str],
    spacing_mm: tuple[float, float, float],
) -> dict[str, float]:
    """A network that draws nothing is judged as one that draws its mask again and again."""
    reference = volume.labels[0].numpy()
    mask = probabilities.argmax(0).astype(np.uint8)
    drawn = np.stack([mask, mask]) if samples is None else samples
    indices = dict(enumerate(names.values()))
    scores, voxel_ml = score_masks(mask, reference, indices, spacing_mm), float(np.prod(spacing_mm)) / 1000
    together, alike = tally(drawn, len(names)), one_sample_dice(drawn, reference, len(names))
    found = {}
    for index, key in label_keys(indices).items():
        volumes_ml = together.counts[:, index].numpy() * voxel_ml
        low, high = np.quantile(volumes_ml, [0.05, 0.95])
        of_volume = volume_measures(volumes_ml, (float(low), float(high)), scores[index].reference_ml)
        measures = {
            "dice": scores[index].dice,
            "hd95_mm": scores[index].hd95_mm,
            "expected_dice": expected_dice(probabilities[index]),
            "coverage": float(of_volume.covered),
            "width": of_volume.interval_width,
            "crps": of_volume.crps,
            "ged2": sample_measures(drawn, reference[None], index).energy,
            "agreement": float(agreement(together)[index]),
            "one_sample": float(alike[index]),
        }
        found |= {f"{name}/{key}": value for name, value in measures.items()}
    return found


def tally(maps: np.ndarray, classes: int) -> Tally:
    counted = Tally.empty(len(maps), classes)
    counted.add(torch.from_numpy(np.ascontiguousarray(maps)))
    return counted


def one_sample_dice(samples: np.ndarray, reference: np.ndarray, classes: int) -> np.ndarray:
    """Mean Dice of the samples with the reference, for each class."""
    return np.mean([agreement(tally(np.stack([mask, reference]), classes)) for mask in samples], axis=0)


def means(cases: list[dict[str, Any]], keys: list[str]) -> dict[str, float]:
    """MEASURE/LABEL over the cases where it is defined, MEASURE over the labels; Spearman's of expected Dice."""
    found: dict[str, float] = {}
    for measure in dict.fromkeys(name.split("/")[0] for name in cases[0] if "/" in name):
        for key in keys:
            found[f"{measure}/{key}"] = mean([case[f"{measure}/{key}"] for case in cases])
        found[measure] = mean([found[f"{measure}/{key}"] for key in keys])
    pairs = [([case[f"{m}/{key}"] for case in cases] for m in ("expected_dice", "dice")) for key in keys]
    found["expected_dice_rank"] = mean([rank_correlation(*pair) for pair in pairs])
    return found


def mean(values: list[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return fmean(defined) if defined else math.nan


def per_case(result: Mapping[str, Any], measure: str) -> dict[str, float]:
    """The mean over labels of every case, by its name."""
    return {
        case["name"]: mean([value for name, value in case.items() if name.startswith(f"{measure}/")])
        for case in result["cases"]
    }


def differences(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], measure: str) -> np.ndarray:
    """First - second, [seeds, cases], where either has the seed and the case; results come by rising seed."""
    pairs = [(per_case(a, measure), per_case(b, measure)) for a, b in zip(first, second, strict=False)]
    return np.array([[a[name] - b[name] for name in a if name in b] for a, b in pairs])


def bootstrap(difference: np.ndarray, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of paired differences [seeds, cases]: seeds and cases are drawn anew, each as a whole.

    Where a case has no value (nan) it is left out of the mean.
    """
    rng = np.random.default_rng(seed)
    seeds, cases = difference.shape
    rows, columns = rng.integers(seeds, size=(draws, seeds)), rng.integers(cases, size=(draws, cases))
    found = [np.nanmean(difference[np.ix_(row, column)]) for row, column in zip(rows, columns, strict=True)]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
