"""How two sets of images differ, and how images within one do: pure functions of features, images and label maps."""

import numpy as np
import torch
from jaxtyping import Float, Float64, Integer
from monai.metrics.regression import compute_ms_ssim
from scipy.spatial.distance import cdist
from torch import Tensor

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of the scales of MS-SSIM, the finest first (Wang et al. 2003)."""

KERNEL = 7
"""Voxels along a side of MS-SSIM's Gaussian window; the usual 11 leaves small images a single scale."""

TOGETHER = 8
"""Pairs in one call."""


def frechet_distance(a: Float64[np.ndarray, "n d"], b: Float64[np.ndarray, "m d"]) -> float:
    """Squared Frechet distance between the Gaussians of two sets (Heusel et al. 2017), in squared units of a feature.

    It is biased upwards, the more the fewer images there are: only distances with the same n and m compare.
    """
    (root_a, spread_a), (root_b, spread_b) = map(_spread, (a, b))
    overlap = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()  # trace of (cov_a cov_b)^(1/2)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + spread_a + spread_b - 2 * overlap)


def kernel_distance(a: Float64[np.ndarray, "n d"], b: Float64[np.ndarray, "m d"]) -> float:
    """Squared MMD by the kernel (x.y / d + 1)^3, unbiased: 0 on average, and at times below, for equal distributions.

    Binkowski et al. 2018, section 4.
    """

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: np.ndarray) -> float:
        k = kernel(x, x)
        return float(k.sum() - np.trace(k)) / (len(x) * (len(x) - 1))

    return within(a) + within(b) - 2 * float(kernel(a, b).mean())


def precision_recall(
    generated: Float64[np.ndarray, "n d"], real: Float64[np.ndarray, "m d"], k: int = 3
) -> tuple[float, float]:
    """Share of the generated among the real, and of the real among the generated (Kynkaanniemi et al. 2019).

    An image is among others where it lies no farther from one of them than that one's k-th neighbour.
    """
    across = cdist(generated, real)
    precise = (across <= _radii(real, k)).any(1)
    recalled = (across <= _radii(generated, k)[:, None]).any(0)
    return float(precise.mean()), float(recalled.mean())


def ms_ssim_diversity(
    images: Float[Tensor, "n channels *size"], intensities: tuple[float, float], *, pairs: int, seed: int
) -> float:
    """Mean MS-SSIM of random pairs of different images: the lower, the more varied; 1 where all are equal.

    `intensities`, lowest and highest, set the scale; the same must be given for sets that are compared. The smallest
    side decides on the number of scales: up to 5, as many as the window fits into.
    """
    low, high = intensities
    if not low < high:
        raise ValueError(f"intensities from {low} to {high}: give the lowest and the highest of the real images")
    rng = np.random.default_rng(seed)
    first = rng.integers(len(images), size=pairs)
    second = (first + rng.integers(1, len(images), size=pairs)) % len(images)
    scaled = (images.float() - low) / (high - low)
    weights = WEIGHTS[: _scales(min(images.shape[2:]))]
    weights = tuple(weight / sum(weights) for weight in weights)
    found = [
        compute_ms_ssim(scaled[pair[0]], scaled[pair[1]], images.ndim - 2, kernel_size=KERNEL, weights=weights)
        for pair in np.array_split(np.stack([first, second]), -(-pairs // TOGETHER), axis=1)
    ]
    return float(torch.cat(found).mean())


def label_statistics(
    masks: Integer[np.ndarray, "n *size"], value: int, voxel: float
) -> tuple[float, float | None, float | None]:
    """Share of the masks that hold a label; mean and standard deviation of its extent in those, None without any.

    `voxel` is the extent of a voxel (or of a pixel), in the unit of the result.
    """
    extents = (masks == value).reshape(len(masks), -1).sum(1) * voxel
    held = extents[extents > 0]
    if not len(held):
        return 0.0, None, None
    return len(held) / len(masks), float(held.mean()), float(held.std())


def _spread(x: Float64[np.ndarray, "n d"]) -> tuple[Float64[np.ndarray, "k d"], float]:
    """A root of the covariance, which is root.T @ root, and its trace."""
    centred = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    return np.asarray(np.linalg.qr(centred, mode="r")), float((centred**2).sum())


def _radii(x: Float64[np.ndarray, "n d"], k: int) -> Float64[np.ndarray, "n"]:
    """Distance of each to its k-th neighbour; column 0 of the sorted distances is its own."""
    return np.partition(cdist(x, x), k, axis=1)[:, k]


def _scales(side: int) -> int:
    """Scales whose coarsest still holds the window; (s - 1)^2 is what MONAI asks for beside the halving."""
    return max(s for s in range(1, len(WEIGHTS) + 1) if s == 1 or side >= KERNEL * max(2 ** (s - 1), (s - 1) ** 2))
