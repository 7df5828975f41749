"""Volume intervals that hold as many references as they say: split conformal prediction, fitted on held-out cases.

As conformalized quantile regression (Romano et al. 2019), but scaled instead of shifted: the two halves of the samples'
interval, each side of the median for itself, are stretched by the one factor that would have held enough references.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from medseg_diff.calibrated import NOMINAL
from medseg_diff.ensemble import scaled_interval, spread

FOLDS = 5
"""Of the cross-validated coverage: case i is in fold i % FOLDS."""


@dataclass(frozen=True)
class Volumes:
    """Of a label in one case: of the samples, and of its references, one a rater."""

    drawn_ml: Float[np.ndarray, "samples"]
    references_ml: Float[np.ndarray, "raters"]


def scores(case: Volumes, voxel_ml: float) -> Float[np.ndarray, "raters"]:
    """The factor that each reference needs to lie in the interval: its distance from the median in half-widths."""
    middle, below, above = spread(case.drawn_ml, voxel_ml)
    return np.maximum((middle - case.references_ml) / below, (case.references_ml - middle) / above)


def factor(cases: Sequence[Float[np.ndarray, "_"]]) -> float | None:
    """The factor that holds a rater of a new case with probability NOMINAL at least, from the scores of each case.

    The ceil(NOMINAL (n + 1))-th smallest of n scores, which is right for every n where cases are exchangeable; None
    where there is none, of fewer than 9. The raters of a case share its weight (Lee, Barber and Willett 2023).
    """
    if not cases:
        return None
    values = np.concatenate(cases)
    weights = np.concatenate([np.full(len(case), 1 / len(case)) for case in cases])
    order = np.argsort(values)
    enough = np.cumsum(weights[order]) >= NOMINAL * (len(cases) + 1) - 1e-9
    # A hair more: rounding would leave out the very volume that sets it.
    return float(values[order][enough.argmax()]) * (1 + 1e-9) if enough.any() else None


def cross_validated(cases: Sequence[Volumes], voxel_ml: float) -> tuple[float | None, float | None]:
    """Coverage and mean width of the intervals of cases that their factor does not know, FOLDS times.

    The width is relative to the reference's volume, where there is any. None of too few cases, see `factor`.
    """
    needed = [scores(case, voxel_ml) for case in cases]
    covered, widths = [], []
    for fold in range(FOLDS):
        stretch = factor([score for i, score in enumerate(needed) if i % FOLDS != fold])
        if stretch is None:
            return None, None
        for case, score in zip(cases[fold::FOLDS], needed[fold::FOLDS], strict=True):
            covered.append(float(np.mean(score <= stretch)))
            low, high = scaled_interval(case.drawn_ml, stretch, voxel_ml)
            widths += [(high - low) / v for v in case.references_ml.tolist() if v > 0]
    return math.fsum(covered) / len(covered), math.fsum(widths) / len(widths) if widths else None
