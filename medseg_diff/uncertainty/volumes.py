"""Volumes of sampled masks against the volume of the reference."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class VolumeMeasures:
    """What the volumes of one case's samples are worth for one label.

    Attributes:
        covered: whether the interval holds the reference's volume; its mean over cases is the coverage.
        interval_width: of the interval, relative to the reference's volume; nan where that is 0.
        raw_covered, raw_width: the same of the samples' own quantiles at 5 and 95 %, by linear interpolation and
            neither calibrated nor widened. A right sampler of n volumes covers about .9 (n - 1) / (n + 1).
        crps: E|V - v| - E|V - V'| / 2 over different samples V and V' (Gneiting and Raftery 2007; fair by Ferro 2014,
            so that it does not depend on how many are drawn), relative to the reference's volume v. 0 where all
            samples are right; nan where v is 0, or of one sample.

    """

    covered: bool
    interval_width: float
    raw_covered: bool
    raw_width: float
    crps: float


def volume_measures(
    volumes_ml: Float[np.ndarray, "samples"], interval_ml: tuple[float, float], reference_ml: float
) -> VolumeMeasures:
    """The samples' volumes, and the interval that is reported of them, against the reference's volume."""
    held, widths = [], []
    for low, high in (interval_ml, raw_interval(volumes_ml)):
        held.append(low <= reference_ml <= high)
        widths.append((high - low) / reference_ml if reference_ml else math.nan)
    score = crps(volumes_ml, reference_ml) / reference_ml if reference_ml else math.nan
    return VolumeMeasures(held[0], widths[0], held[1], widths[1], score)


def raw_interval(volumes_ml: Float[np.ndarray, "samples"]) -> tuple[float, float]:
    """The samples' own quantiles at 5 and 95 %."""
    low, high = np.quantile(volumes_ml, [0.05, 0.95]).tolist()
    return low, high


def crps(draws: Float[np.ndarray, "samples"], truth: float) -> float:
    """The continuous ranked probability score, see VolumeMeasures, in the unit of the draws; nan of fewer than two."""
    n = len(draws)
    if n < 2:
        return math.nan
    apart = np.abs(draws[:, None] - draws).sum() / (n * (n - 1))
    return float(np.abs(draws - truth).mean() - apart / 2)
