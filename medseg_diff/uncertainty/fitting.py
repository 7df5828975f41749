"""Calibration of a model on cases that it was not trained on, gathered while they are evaluated."""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Integer
from torch import Tensor

from medseg_diff.calibrated import Calibrated, IntervalFit
from medseg_diff.uncertainty.conformal import Volumes, cross_validated, factor, scores
from medseg_diff.uncertainty.temperature import TemperedLoss


def _lists() -> dict[int, list[Volumes]]:
    return defaultdict(list)


@dataclass
class Fitting:
    """What calibration needs of every case: the loss at each temperature and, by label value, volumes."""

    cases: int = 0
    loss: TemperedLoss = field(default_factory=TemperedLoss)
    volumes: dict[int, list[Volumes]] = field(default_factory=_lists)

    def add_mean(
        self, probabilities: Float[Tensor, "classes *space"], references: Integer[np.ndarray, "raters *space"]
    ) -> None:
        """The mean head's probabilities of a case, and the class indices of its references on the same grid."""
        for reference in references:
            self.loss.add(probabilities, reference)

    def add_volumes(
        self, value: int, drawn_ml: Float[np.ndarray, "samples"], references_ml: Float[np.ndarray, "raters"]
    ) -> None:
        """The volumes of a label in a case."""
        self.volumes[value].append(Volumes(drawn_ml, references_ml))

    def fit(self, samples: int, steps: int, voxel_ml: float) -> Calibrated | None:
        """None of nothing. `samples` and `steps` are how the volumes were drawn, on a grid of such voxels."""
        if not self.cases and not self.loss.voxels:
            return None
        temperature, before, after = self.loss.best() if self.loss.voxels else (None, None, None)
        intervals = {}
        for value, cases in self.volumes.items():
            stretch = factor([scores(case, voxel_ml) for case in cases])
            if stretch is not None:
                intervals[value] = IntervalFit(stretch, *cross_validated(cases, voxel_ml))
        return Calibrated(self.cases, temperature, before, after, samples, steps, intervals)
