"""The measures of a model's uncertainty over the cases of a data set, as summary.json has them, and its diagram."""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float, Shaped

from medseg_diff.figures import Panel, draw_lines
from medseg_diff.uncertainty.calibration import Calibration, rank_correlation
from medseg_diff.uncertainty.diversity import sample_measures
from medseg_diff.uncertainty.volumes import volume_measures


def _lists() -> dict[str, list[float]]:
    return defaultdict(list)


@dataclass
class Collection:
    """What is counted of voxels, and a value for each case, or case and rater, of every measure of a label."""

    calibration: Calibration = field(default_factory=Calibration)
    values: dict[str, list[float]] = field(default_factory=_lists)
    dice: dict[str, list[float]] = field(default_factory=_lists)

    def add_estimates(self, label: str, dice: float, **estimates: float | None) -> None:
        """What a case says of its own Dice before anyone knows it, and the true one; nan where that is undefined."""
        self.dice[label].append(dice)
        for name, value in estimates.items():
            self.values[f"{name}/{label}"].append(math.nan if value is None else value)

    def add_volumes(
        self,
        label: str,
        volumes_ml: Float[np.ndarray, "samples"],
        interval_ml: tuple[float, float],
        reference_ml: float,
    ) -> None:
        """The measures of a case's sampled volumes against one rater's, and of the interval that is reported."""
        found = volume_measures(volumes_ml, interval_ml, reference_ml)
        for name, value in (
            ("coverage90", found.covered), ("interval_width", found.interval_width), ("crps", found.crps),
            ("coverage90_raw", found.raw_covered), ("width90_raw", found.raw_width),
        ):  # fmt: skip
            self.values[f"{name}/{label}"].append(float(value))

    def add_samples(
        self,
        label: str,
        samples: Shaped[np.ndarray, "samples *space"],
        references: Shaped[np.ndarray, "raters *space"],
        index: int,
    ) -> None:
        """The measures of a case's sampled masks against those of its raters; the label is `index` in the maps."""
        found = sample_measures(samples, references, index)
        for name, value in {**vars(found), "presence_brier": found.presence_brier}.items():
            self.values[f"{name}/{label}"].append(value)

    def add(self, measures: dict[str, float]) -> None:
        """Other measures of a case, by name."""
        for name, value in measures.items():
            self.values[name].append(value)

    def means(self) -> dict[str, float | None]:
        """Calibration over all voxels; MEASURE/LABEL, mean over the cases where it is defined; rank correlations.

        `expected_dice_correlation` and `agreement_correlation` are Spearman's with the true Dice over cases, for each
        label alone, and then the mean over labels. None for what is undefined.
        """
        found = vars(self.calibration.measures()) | {name: _mean(values) for name, values in self.values.items()}
        for estimate in ("expected_dice", "agreement"):
            pairs = [(self.values.get(f"{estimate}/{label}", []), dice) for label, dice in self.dice.items()]
            found[f"{estimate}_correlation"] = _mean([rank_correlation(*pair) for pair in pairs if pair[0]])
        return {name: None if math.isnan(value) else value for name, value in found.items()}


def draw_reliability(calibration: Calibration, path: Path) -> None:
    """Accuracy over confidence in bins of equal numbers of voxels, of all and of those near the reference's borders."""
    bins = {"all voxels": calibration.reliability(), "near borders": calibration.reliability(band=True)}
    curves = {name: (b.confidence.tolist(), b.accuracy.tolist()) for name, b in bins.items()}
    low = min((value for curve in curves.values() for values in curve for value in values), default=0)
    ideal = {"as it should be": ([low, 1], [low, 1])}
    draw_lines([Panel("Reliability", "confidence", "accuracy", curves, ideal)], path)


def _mean(values: list[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return math.fsum(defined) / len(defined) if defined else math.nan
