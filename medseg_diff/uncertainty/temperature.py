"""Probabilities at another temperature T: p^(1/T), scaled to sum to 1; a softmax of logits / T (Guo et al. 2017)."""

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from medseg_diff.diffusion.masks import IGNORED
from medseg_diff.uncertainty.calibration import SMALLEST

TEMPERATURES = np.geomspace(0.25, 4, 33)
"""Where the loss is counted; the middle one is 1."""

VOXELS_AT_ONCE = 500_000
"""Bounds the memory."""


def tempered(probabilities: Float[Tensor, "classes *space"], temperature: float) -> Float[Tensor, "classes *space"]:
    """Softer above 1, sharper below; the order of the classes stays."""
    found = probabilities.pow(1 / temperature)
    return found / found.sum(0)


def _zeros() -> np.ndarray:
    return np.zeros(len(TEMPERATURES))


@dataclass
class TemperedLoss:
    """The NLL at every one of TEMPERATURES, summed over all voxels as they come: exact, and memory does not grow."""

    sums: Float[np.ndarray, "temperatures"] = field(default_factory=_zeros)
    voxels: int = 0

    def add(self, probabilities: Float[Tensor, "classes *space"], reference: Integer[np.ndarray, "*space"]) -> None:
        """Counts a case: probabilities, and the reference's class indices. The log is clipped as in `calibration`."""
        known = torch.from_numpy(reference != IGNORED)
        labels = torch.from_numpy(reference.astype(np.int64))[known].split(VOXELS_AT_ONCE)
        parts = probabilities[:, known].split(VOXELS_AT_ONCE, dim=1)
        for part, label in zip(parts, labels, strict=True):
            log_p = part.log()
            truth = log_p.gather(0, label[None])[0]
            for index, temperature in enumerate(TEMPERATURES.tolist()):
                total = (log_p / temperature).exp_().sum(0)
                loss = (total.log_() - truth / temperature).clamp_max(-np.log(SMALLEST))
                self.sums[index] += float(loss.sum(dtype=torch.float64))
        self.voxels += int(known.sum())

    def best(self) -> tuple[float, float, float]:
        """The temperature with the smallest NLL, the mean NLL at temperature 1, and at that one.

        Between two of TEMPERATURES by the parabola through the three nearest. Raises ValueError without voxels.
        """
        if not self.voxels:
            raise ValueError("no voxel was counted: add a case first")
        mean, at = self.sums / self.voxels, np.log(TEMPERATURES)
        least, before = int(mean.argmin()), float(mean[len(mean) // 2])
        if least in (0, len(mean) - 1):
            return float(TEMPERATURES[least]), before, float(mean[least])
        a, b, c = np.polyfit(at[least - 1 : least + 2] - at[least], mean[least - 1 : least + 2], 2)
        shift = -b / (2 * a) if a > 0 else 0.0
        return float(np.exp(at[least] + shift)), before, float(c + b * shift + a * shift**2)
