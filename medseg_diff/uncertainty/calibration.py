"""Probabilities against a label map: whether they mean what they say, and whether doubt lies where the errors are.

Everything is counted over all voxels of all cases as they come, in fine histograms of the confidence: a data set's ECE
is no mean of its cases', and memory does not grow.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Integer
from scipy.stats import spearmanr

from medseg_diff.diffusion.masks import IGNORED

DICE_STEPS = 50
"""A bound; five are usual."""

SMALLEST = 1e-6
"""Probabilities are clipped to it in the NLL: a certain error costs 13.8."""

BINS = 15
"""Of the ECE and the reliability diagram."""

FINE = 4096
"""Bins of the histograms, equal on a logarithmic scale of the uncertainty from 1e-7 to 1: each is 0.4 % wide."""

BAND_VOXELS = 3
"""Half the width of the band around the reference's borders."""

CONFIDENT = 0.99

VOXELS_AT_ONCE = 4_000_000
"""Voxels that enter the histograms at a time: bounds the memory."""


@dataclass(frozen=True)
class CalibrationMeasures:
    """Over all voxels of a data set. Confidence is the probability of the most probable label; uncertainty, 1 - that.

    Attributes:
        nll: mean of -ln p(reference's label), p clipped to SMALLEST; nats.
        brier: mean of the squared error of p, summed over classes, 0 to 2 (Brier 1950).
        ece: |confidence - accuracy| of BINS bins with as equal numbers of voxels as equal confidences allow, weighted
            by these numbers (Nixon et al. 2019). Background, easily right, makes it small.
        ece_band: the same within BAND_VOXELS of the reference's borders; nan where no case has any.
        confident_errors: share of the wrong voxels whose confidence is CONFIDENT at least; nan without wrong ones.
        error_auroc: probability that a wrong voxel is more uncertain than a right one, ties half; nan without both.
        aurc: area under the risk-coverage curve: the share of wrong voxels among the most confident ones, mean over
            how many are kept (Geifman and El-Yaniv 2017). Voxels of a fine bin are kept together.

    """

    nll: float
    brier: float
    ece: float
    ece_band: float
    confident_errors: float
    error_auroc: float
    aurc: float


@dataclass(frozen=True)
class Reliability:
    """The bins of a reliability diagram by rising confidence, without the empty ones; weights add up to 1."""

    confidence: Float[np.ndarray, "bins"]
    accuracy: Float[np.ndarray, "bins"]
    weight: Float[np.ndarray, "bins"]

    @property
    def ece(self) -> float:
        """The expected calibration error; nan without voxels."""
        gap = np.abs(self.confidence - self.accuracy)
        return float(gap @ self.weight) if len(gap) else math.nan


def _histogram() -> np.ndarray:
    return np.zeros((3, FINE))


@dataclass
class Calibration:
    """Voxels, wrong ones and their summed uncertainty in bins of the uncertainty, everywhere and in the band; sums."""

    everywhere: Float[np.ndarray, "3 fine"] = field(default_factory=_histogram)
    band: Float[np.ndarray, "3 fine"] = field(default_factory=_histogram)
    log_loss: float = 0.0
    squared_error: float = 0.0
    confident_errors: int = 0

    def add(
        self, probabilities: Iterable[Float[np.ndarray, "*space"]], reference: Integer[np.ndarray, "*space"]
    ) -> None:
        """Counts a case: a map of every class, of which one is held at a time, and the reference's class indices."""
        known = reference != IGNORED
        best, right = np.full(reference.shape, -1, np.float32), np.zeros(reference.shape, bool)
        truth = np.zeros(reference.shape, np.float32)
        for index, p in enumerate(probabilities):
            member = reference == index
            error = (p - member)[known]
            self.squared_error += float(error @ error)
            truth[member] = p[member]
            better = p > best
            right[better] = member[better]
            np.maximum(best, p, out=best)
        self.log_loss -= float(np.log(np.maximum(truth[known], SMALLEST)).sum(dtype=np.float64))
        self.confident_errors += int(np.count_nonzero(known & ~right & (best >= CONFIDENT)))
        band = border_band(reference) & known
        _count(self.everywhere, best[known], right[known])
        _count(self.band, best[band], right[band])

    def measures(self) -> CalibrationMeasures:
        """Of all cases together; nan without any."""
        count, wrong, _ = self.everywhere
        n, n_wrong = count.sum(), wrong.sum()
        right = count - wrong
        ahead = np.cumsum(right) - right / 2  # of every bin: right voxels that are less uncertain, its own half
        kept = np.maximum(np.cumsum(count), 1)
        return CalibrationMeasures(
            nll=_ratio(self.log_loss, n),
            brier=_ratio(self.squared_error, n),
            ece=self.reliability().ece,
            ece_band=self.reliability(band=True).ece,
            confident_errors=_ratio(self.confident_errors, n_wrong),
            error_auroc=_ratio(ahead @ wrong, n_wrong * (n - n_wrong)),
            aurc=_ratio(count @ (np.cumsum(wrong) / kept), n),
        )

    def reliability(self, band: bool = False) -> Reliability:
        """Confidence and accuracy in BINS bins of equal numbers of voxels; a fine bin is never divided."""
        count, wrong, uncertainty = (self.band if band else self.everywhere)[:, ::-1]
        ahead = np.cumsum(count) - count
        bins = (BINS * ahead / max(count.sum(), 1)).astype(int).clip(max=BINS - 1)
        mass, wrong, uncertainty = (np.bincount(bins, row, BINS) for row in (count, wrong, uncertainty))
        held = mass > 0
        mass, wrong, uncertainty = mass[held], wrong[held], uncertainty[held]
        return Reliability(1 - uncertainty / mass, 1 - wrong / mass, mass / max(mass.sum(), 1))


def border_band(labels: Integer[np.ndarray, "*space"]) -> Bool[np.ndarray, "*space"]:
    """Voxels within BAND_VOXELS of a border between two labels, on both of its sides; the image's edge is no border."""
    border = np.zeros(labels.shape, bool)
    for axis in range(labels.ndim):
        along = np.moveaxis(border, axis, 0)
        differs = np.diff(np.moveaxis(labels, axis, 0), axis=0) != 0
        along[1:] |= differs
        along[:-1] |= differs
    # Squared distances axis by axis, no further than they matter: that of a whole CT would take gigabytes.
    squared = np.where(border, 0, BAND_VOXELS**2).astype(np.uint8)
    for axis in range(labels.ndim):
        along = np.moveaxis(squared, axis, 0)
        before = along.copy()
        for step in range(1, BAND_VOXELS):
            np.minimum(along[step:], before[:-step] + step**2, out=along[step:])
            np.minimum(along[:-step], before[step:] + step**2, out=along[:-step])
    return squared < BAND_VOXELS**2


def expected_dice(probability: Float[np.ndarray, "*space"]) -> float:
    """The Dice to expect of a label's mask: max over thresholds of 2 sum(p above) / (sum(p) + count above).

    The best threshold is half of the result (Lipton et al. 2014), to which each step comes closer (Dinkelbach 1967);
    a sort would need ten times the memory. nan where no voxel can hold the label.
    """
    total = float(probability.sum(dtype=np.float64))
    if total <= 0:
        return math.nan
    dice = 1.0
    for _ in range(DICE_STEPS):
        above = probability[probability > dice / 2]
        dice, before = 2 * float(above.sum(dtype=np.float64)) / (total + len(above)), dice
        if dice == before:
            break
    return dice


def rank_correlation(estimates: Sequence[float], truths: Sequence[float]) -> float:
    """Spearman's over the cases where both are defined; nan of fewer than three, or where one does not vary."""
    both = np.array([estimates, truths], np.float64)
    both = both[:, np.isfinite(both).all(0)]
    if both.shape[1] < 3 or (both == both[:, :1]).all(1).any():
        return math.nan
    return float(spearmanr(*both).statistic)


def _count(
    histogram: Float[np.ndarray, "3 fine"], confidence: Float[np.ndarray, "voxels"], right: Bool[np.ndarray, "voxels"]
) -> None:
    for start in range(0, len(right), VOXELS_AT_ONCE):
        part = slice(start, start + VOXELS_AT_ONCE)
        u = np.clip(1 - confidence[part], 0, 1)
        bins = np.minimum((np.log(np.maximum(u, 1e-7)) / math.log(1e7) + 1) * FINE, FINE - 1).astype(np.int32)
        for row, weights in zip(histogram, (None, ~right[part], u), strict=True):
            row += np.bincount(bins, weights, FINE)


def _ratio(part: float | int, whole: float | int) -> float:
    return float(part / whole) if whole else math.nan
