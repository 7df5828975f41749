"""What a scan holds under each label of its mask."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Integer


@dataclass(frozen=True)
class LabelStatistics:
    """Of the voxels of a label; nothing where it has none.

    Attributes:
        intensity_mean: by the name of the channel, in the scan's own unit.
        intensity_std: likewise, of all the voxels and no sample of them.
        centroid_mm: in the world, along right, anterior, superior.

    """

    intensity_mean: dict[str, float] | None
    intensity_std: dict[str, float] | None
    centroid_mm: tuple[float, float, float] | None


def label_statistics(
    label_map: Integer[np.ndarray, "x y z"],
    values: Sequence[int],
    array: Float32[np.ndarray, "channels x y z"],
    affine: Float[np.ndarray, "4 4"],
    channels: Sequence[str],
) -> list[LabelStatistics]:
    """One for each of the label values, slice by slice: no copy of the scan is made."""
    place = np.zeros(max([*values, int(label_map.max())]) + 1, int)
    place[list(values)] = range(1, len(values) + 1)
    rows, columns = np.indices(label_map.shape[:2]).reshape(2, -1)
    shift = array.mean((1, 2, 3), dtype=np.float64)  # of large numbers the squares would drown the differences
    sums = np.zeros((len(values) + 1, 4 + 2 * len(array)))
    for z in range(label_map.shape[2]):
        labels = place[label_map[:, :, z]].ravel()
        found = np.flatnonzero(labels)
        intensities = array[:, :, :, z].reshape(len(array), -1)[:, found] - shift[:, None]
        terms = [np.ones(len(found)), rows[found], columns[found], np.full(len(found), z)]
        for k, weights in enumerate([*terms, *intensities, *np.square(intensities)]):
            sums[:, k] += np.bincount(labels[found], weights, len(sums))
    return [_statistics(row, affine, shift, channels) for row in sums[1:]]


def _statistics(sums: np.ndarray, affine: np.ndarray, shift: np.ndarray, channels: Sequence[str]) -> LabelStatistics:
    if sums[0] == 0:
        return LabelStatistics(None, None, None)
    mean, square = (sums[1:] / sums[0])[3:].reshape(2, -1)
    deviation = np.sqrt(np.maximum(square - mean**2, 0))
    x, y, z = (affine @ [*(sums[1:4] / sums[0]), 1])[:3].tolist()
    means, deviations = (dict(zip(channels, n.tolist(), strict=True)) for n in (mean + shift, deviation))
    return LabelStatistics(means, deviations, (x, y, z))
