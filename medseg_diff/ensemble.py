"""What many sampled masks say together. Everything is counted as it is drawn; no stack of volumes is kept."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

VOXELS_AT_ONCE = 4_000_000
"""Voxels times samples that are compared at once: bounds the memory; below 2^24 the counts are exact in float32."""

STAPLE_ITERATIONS = 100
"""Samples without any structure never converge."""


@dataclass(frozen=True)
class LabelReport:
    """What is said of a label; interval and agreement are null where the model draws no samples.

    `expected_dice` is the Dice to expect of its mask by the probabilities alone, null where none is above 0.
    """

    value: int
    name: str
    volume_ml: float
    volume_ml_interval90: tuple[float, float] | None
    agreement: float | None
    expected_dice: float | None


@dataclass
class Tally:
    """Voxel counts of samples: [samples, classes], and of what every two have in common [samples, samples, classes]."""

    counts: Float[Tensor, "samples classes"]
    common: Float[Tensor, "samples samples classes"]

    @classmethod
    def empty(cls, samples: int, classes: int) -> "Tally":
        """Nothing counted yet."""
        zeros = torch.zeros(samples, samples, classes, dtype=torch.float64)
        return cls(zeros[0].clone(), zeros)

    def add(self, labels: UInt8[Tensor, "samples *space"]) -> None:
        """Counts a part of the volume; parts must not overlap."""
        for part in labels.flatten(1).split(max(1, VOXELS_AT_ONCE // len(labels)), dim=1):
            for index in range(self.counts.shape[1]):
                member = (part == index).float()
                self.counts[:, index] += member.sum(1).double().cpu()
                self.common[..., index] += (member @ member.T).double().cpu()


def label_reports(
    names: dict[int, str],
    label_map: Integer[np.ndarray, "x y z"],
    voxel_ml: float,
    tally: Tally | None,
    grid_voxel_ml: float,
    expected_dice: dict[int, float],
    factors: Mapping[int, float],
) -> tuple[LabelReport, ...]:
    """Each label but the background: its volume in the map, and what the samples, on a grid of their own, say of it.

    `expected_dice` is that of every label by its value, nan where it is undefined; `factors` stretch the intervals, of
    the labels that were calibrated.
    """
    found = []
    agreements = [None] * len(names) if tally is None else agreement(tally).tolist()
    for index, (value, name) in enumerate(names.items()):
        if value:
            volume = float(np.count_nonzero(label_map == value)) * voxel_ml
            interval = None
            if tally is not None:
                drawn_ml = tally.counts[:, index].numpy() * grid_voxel_ml
                interval = interval90(drawn_ml, volume, factors.get(value), grid_voxel_ml)
            expected = None if math.isnan(expected_dice[value]) else expected_dice[value]
            found.append(LabelReport(value, name, volume, interval, agreements[index], expected))
    return tuple(found)


def agreement(tally: Tally) -> Float[np.ndarray, "classes"]:
    """Mean Dice between two samples, for each class; two empty masks agree."""
    rows, columns = torch.triu_indices(len(tally.counts), len(tally.counts), offset=1)
    mass = tally.counts[rows] + tally.counts[columns]
    dice = torch.where(mass > 0, 2 * tally.common[rows, columns] / mass.clamp_min(1), torch.ones_like(mass))
    return dice.mean(0).numpy()


def nominal_level(samples: int) -> float:
    """The share of truths that `interval90` of so many draws covers where the sampler is right."""
    return min(0.9, (samples - 1) / (samples + 1))


def interval90(
    volumes_ml: Float[np.ndarray, "samples"], reported_ml: float, factor: float | None = None, voxel_ml: float = 0.0
) -> tuple[float, float]:
    """The 5th and the 95th percentile of the volume, widened to hold the volume that is reported.

    Of n exchangeable draws and the truth, the truth lies below the k-th smallest draw with probability k / (n + 1):
    hence Weibull's plotting positions. Fewer than 19 draws cannot reach 90 % and give their range; see `nominal_level`.
    With a `factor` that was calibrated, the `scaled_interval` in their place.
    """
    low, high = _percentiles(volumes_ml) if factor is None else scaled_interval(volumes_ml, factor, voxel_ml)
    return min(low, reported_ml), max(high, reported_ml)


def scaled_interval(volumes_ml: Float[np.ndarray, "samples"], factor: float, voxel_ml: float) -> tuple[float, float]:
    """Both sides of the median stretched by a factor, each for itself; no volume is below 0."""
    middle, below, above = spread(volumes_ml, voxel_ml)
    return max(0.0, middle - factor * below), middle + factor * above


def spread(volumes_ml: Float[np.ndarray, "samples"], voxel_ml: float) -> tuple[float, float, float]:
    """The median, and how far the 5th and the 95th percentile are from it; a voxel more, so that neither is ever 0."""
    low, high = _percentiles(volumes_ml)
    middle = float(np.median(volumes_ml))
    return middle, middle - low + voxel_ml, high - middle + voxel_ml


def _percentiles(volumes_ml: Float[np.ndarray, "samples"]) -> tuple[float, float]:
    low, high = np.quantile(volumes_ml, [0.05, 0.95], method="weibull")
    return float(low), float(high)


def staple(samples: UInt8[np.ndarray, "samples *space"], classes: int) -> Float[np.ndarray, "{classes} *space"]:
    """Probabilities of every class by STAPLE (Warfield et al. 2004), label by label, scaled to sum to 1.

    It weighs each sample by its estimated sensitivity and specificity, over the whole volume at once, in at most
    STAPLE_ITERATIONS steps. Where samples agree on a label everywhere there is nothing to estimate (SimpleITK answers
    NaN for a label that nobody drew), and their opinion stands. It judges samples, not voxels: a structure that few
    samples draw, and all the same, comes out as a whole or not at all.
    """
    judge = sitk.STAPLEImageFilter()
    judge.SetForegroundValue(1.0)
    judge.SetMaximumIterations(STAPLE_ITERATIONS)
    found = np.empty((classes, *samples.shape[1:]), np.float32)
    for index in range(classes):
        members = (samples == index).astype(np.uint8)
        if (members == members[:1]).all():
            found[index] = members[0]
        else:
            found[index] = sitk.GetArrayFromImage(judge.Execute([sitk.GetImageFromArray(m) for m in members]))
    return found / found.sum(0)
