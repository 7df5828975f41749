"""Sampled masks of a label against those of the raters: their distribution, not their mean."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Shaped
from scipy.optimize import linear_sum_assignment

IMPLAUSIBLE = 0.15
"""1 - IoU to the nearest reference beyond which a sample is no plausible mask."""

VOXELS_AT_ONCE = 4_000_000
"""Voxels times masks that are compared at once: bounds the memory; below 2^24 the counts are exact in float32."""


@dataclass(frozen=True)
class SampleMeasures:
    """What the samples of one case are worth for one label; the distance of two masks is 1 - IoU, 0 if both are empty.

    None of them suffices: coins thrown voxel by voxel have a GED near that of the truth, and no plausible sample.

    Attributes:
        ged2: E d(S,Y) x 2 - E d(S,S') - E d(Y,Y'), over pairs of different masks: unbiased, at times below 0, and 0 on
            average where samples S and references Y have one law (Székely and Rizzo 2013). nan below two of either.
        ged2_diagonal: the same with the pairs of a mask and itself: Kohl et al. 2018, and what papers print. It
            depends on how many are drawn.
        energy: ged2 without its last term, which is that of the references alone: for one reference a case. It ranks
            samplers as ged2 does, but its best value is not 0. nan below two samples.
        hm_iou: mean IoU of samples and references in their best matching one to one (Kohl et al. 2019). Each side is
            repeated to the least common multiple of both counts, so that each mask has its share.
        implausible: share of the samples further than IMPLAUSIBLE from every reference.
        presence: share of the samples that hold the label.
        reference_presence: share of the references that hold it.

    """

    ged2: float
    ged2_diagonal: float
    energy: float
    hm_iou: float
    implausible: float
    presence: float
    reference_presence: float

    @property
    def presence_brier(self) -> float:
        """Squared difference of the shares; its mean over cases is smallest for the true probability (Brier 1950)."""
        return (self.presence - self.reference_presence) ** 2


def sample_measures(
    samples: Shaped[np.ndarray, "samples *space"], references: Shaped[np.ndarray, "raters *space"], label: int = 1
) -> SampleMeasures:
    """All measures of the samples of a label against its references; label maps, or masks with True for the label.

    Both lie on one grid. Raises ValueError without samples or references.
    """
    n, m = len(samples), len(references)
    if not (n and m):
        raise ValueError(f"there are {n} samples and {m} references: give one of each at least")
    counts, distance = _compare(samples, references, label)
    cross = distance[:n, n:]
    among_samples, among_references = distance[:n, :n].sum(), distance[n:, n:].sum()
    energy = 2 * float(cross.mean()) - _ratio(among_samples, n * (n - 1))
    return SampleMeasures(
        ged2=energy - _ratio(among_references, m * (m - 1)),
        ged2_diagonal=float(2 * cross.mean() - among_samples / n**2 - among_references / m**2),
        energy=energy,
        hm_iou=_matched(1 - cross),
        implausible=float((cross.min(1) > IMPLAUSIBLE).mean()),
        presence=float((counts[:n] > 0).mean()),
        reference_presence=float((counts[n:] > 0).mean()),
    )


def _compare(
    samples: Shaped[np.ndarray, "samples *space"], references: Shaped[np.ndarray, "raters *space"], label: int
) -> tuple[Float[np.ndarray, "masks"], Float[np.ndarray, "masks masks"]]:
    """Voxels of every mask, samples first, and the distance of every two."""
    both = [maps.reshape(len(maps), -1) for maps in (samples, references)]
    total = len(samples) + len(references)
    common = np.zeros((total, total))
    step = max(1, VOXELS_AT_ONCE // total)
    for start in range(0, both[0].shape[1], step):
        member = np.concatenate([maps[:, start : start + step] == label for maps in both])
        member = member[:, member.any(0)].astype(np.float32)
        common += member @ member.T
    counts = common.diagonal()
    union = counts[:, None] + counts - common
    return counts, np.where(union > 0, 1 - common / np.maximum(union, 1), 0)


def _matched(iou: Float[np.ndarray, "samples raters"]) -> float:
    n, m = iou.shape
    repeated = np.kron(iou, np.ones((math.lcm(n, m) // n, math.lcm(n, m) // m)))
    return float(repeated[linear_sum_assignment(repeated, maximize=True)].mean())


def _ratio(part: float, whole: int) -> float:
    return float(part) / whole if whole else math.nan
