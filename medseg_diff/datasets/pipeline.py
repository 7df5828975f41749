"""MONAI transforms from a scan to the network's grid, and the way back onto the scan's own grid."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Integer, Shaped
from monai.data import MetaTensor
from monai.data.utils import zoom_affine
from monai.transforms import (
    ClipIntensityPercentilesd,
    Compose,
    NormalizeIntensityd,
    Orientationd,
    ScaleIntensityRanged,
    SpatialResample,
)
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from medseg_diff.config import Data
from medseg_diff.datasets.layouts import Case
from medseg_diff.datasets.reading import read_case, read_reference
from medseg_diff.scans.geometry import spacing_of
from medseg_diff.scans.read import Scan

SLAB_VOXELS = 4_000_000
"""Voxels that are restored at a time: the coordinates of a whole CT would take gigabytes."""

SHARP = 0.15
"""Blur in voxels that is left away: the voxels grow by less than 6 %, as much as scanners round their spacing."""


@dataclass(frozen=True)
class Preprocessing:
    """How intensities and voxels of a scan become those of the network's grid."""

    spacing_mm: tuple[float, float, float]
    modality: Literal["ct", "mr"]
    window_hu: tuple[float, float]
    percentiles: tuple[float, float]


def preprocessing(data: Data) -> Preprocessing:
    """What the transforms need of a configuration whose spacing is resolved."""
    assert data.spacing_mm is not None, "training fills in the spacing"
    return Preprocessing(data.spacing_mm, data.modality, data.window_hu, data.percentiles)


def outside(modality: str) -> float:
    """The intensity, after the transforms, of what lies beyond a scan: air in CT, the mean in MR."""
    return -1.0 if modality == "ct" else 0.0


def load(case: Case, channels: int) -> dict[str, MetaTensor]:
    """`image`, and the `label_0`, `label_1`, ... of its raters, as MONAI's transforms take them. Raises UserError.

    Not by LoadImaged, which says of any refused file that it found no suitable reader.
    """
    scan = read_case(case, channels)
    maps = [read_reference(path, scan)[None].astype(np.int32) for path in case.labels]
    keys = ["image", *label_keys(len(maps))]
    return {key: _volume(array, scan.affine) for key, array in zip(keys, [scan.array, *maps], strict=True)}


def _volume(array: Shaped[np.ndarray, "channels x y z"], affine: Float[np.ndarray, "4 4"]) -> MetaTensor:
    return MetaTensor(torch.from_numpy(array), affine=torch.from_numpy(affine))


def label_keys(raters: int) -> list[str]:
    """Names of the label maps of a case."""
    return [f"label_{rater}" for rater in range(raters)]


@cache
def preparing(how: Preprocessing, raters: int = 0) -> Compose:
    """Orientation (RAS), spacing, intensities: `image` linearly, label maps by the nearest voxel."""
    keys = ["image", *label_keys(raters)]
    orient = Orientationd(keys, axcodes="RAS", labels=None)
    return Compose([orient, partial(_resample, spacing_mm=how.spacing_mm), *_intensities(how)])


def _resample(case: dict[str, MetaTensor], spacing_mm: tuple[float, float, float]) -> dict[str, Any]:
    """All maps of a case onto one grid. MONAI's Spacingd would shift that of oblique scans by a rounding error."""
    image = case["image"]
    affine, shape = network_grid(image.affine.numpy(), image.shape[1:], spacing_mm)
    growth = np.divide(spacing_mm, spacing_of(image.affine.numpy()))
    smooth = case | {"image": MetaTensor(_smoothed(image.as_tensor(), growth), affine=image.affine)}
    return {
        key: SpatialResample("bilinear" if key == "image" else "nearest", padding_mode="border", dtype=np.float32)(
            volume, torch.from_numpy(affine), shape
        )
        for key, volume in smooth.items()
    }


def _smoothed(
    image: Float[Tensor, "channels x y z"], growth: Float[np.ndarray, "3"]
) -> Float[Tensor, "channels x y z"]:
    """Blurred along each axis whose voxels grow, so that what they cannot hold does not alias.

    A Gaussian that turns a point spread of one voxel's full width at half maximum into one of the grown voxel's:
    sigma^2 = (growth^2 - 1) / (8 ln 2), in voxels (Cardoso et al. 2015, "Scale factor point spread function matching").
    """
    for axis, sigma in enumerate(np.sqrt(np.maximum(growth**2 - 1, 0) / (8 * np.log(2))), start=1):
        if sigma > SHARP:
            image = torch.from_numpy(gaussian_filter1d(image.numpy(), sigma, axis, mode="nearest"))
    return image


def network_grid(
    affine: Float[np.ndarray, "4 4"], shape: Sequence[int], spacing_mm: tuple[float, float, float]
) -> tuple[Float[np.ndarray, "4 4"], tuple[int, ...]]:
    """Affine and shape of a grid at right angles with that spacing, in the middle of a scan oriented to RAS."""
    grid = zoom_affine(affine, spacing_mm, diagonal=False)
    corners = np.array([*itertools.product(*((0.0, n - 1) for n in shape))])
    found = _transformed(np.linalg.inv(grid) @ affine, corners)
    low, high = found.min(0), found.max(0)
    lengths = np.floor(high - low + 0.501).astype(int) + 1  # a tie is not left to rounding errors
    grid[:3, 3] = _transformed(grid, (low + high - (lengths - 1)) / 2)
    return grid, tuple(lengths.tolist())


def prepare(scan: Scan, how: Preprocessing) -> MetaTensor:
    """The scan on the network's grid: float32 [channels, x, y, z] with its affine."""
    return preparing(how)({"image": _volume(scan.array, scan.affine)})["image"]


def restore(volume: Float[Tensor, "x y z"], affine: Float[Tensor, "4 4"], scan: Scan) -> Float[np.ndarray, "i j k"]:
    """A map on the network's grid, interpolated linearly onto the scan's own: by world position, slab by slab."""
    source = MetaTensor(volume[None].cpu().double(), affine=affine)  # once: each slab would, of the whole
    resample = SpatialResample(mode="bilinear", padding_mode="border", dtype=np.float64)
    shape = scan.shape
    thickness = max(1, SLAB_VOXELS // (shape[0] * shape[1]))
    restored = np.empty(shape, np.float32)
    for start in range(0, shape[2], thickness):
        size = (*shape[:2], min(thickness, shape[2] - start))
        slab = scan.affine @ _shift(start)
        part: Any = resample(source, dst_affine=torch.from_numpy(slab), spatial_size=size)
        restored[..., start : start + size[2]] = part.as_tensor()[0].numpy()
    return restored


def onto_grid(
    labels: Integer[np.ndarray, "i j k"],
    affine: Float[np.ndarray, "4 4"],
    target: Float[Tensor, "4 4"],
    shape: Sequence[int],
) -> Integer[np.ndarray, "x y z"]:
    """A label map, of indices, on another grid: the nearest voxel's, as in training."""
    resample: Any = SpatialResample("nearest", padding_mode="border", dtype=np.float32)
    return resample(_volume(labels[None], affine), target, shape).numpy()[0].astype(labels.dtype)


def _intensities(how: Preprocessing) -> list[Any]:
    if how.modality == "ct":
        low, high = how.window_hu
        return [ScaleIntensityRanged("image", low, high, -1.0, 1.0, clip=True)]
    low, high = how.percentiles
    clip = ClipIntensityPercentilesd("image", low, high, channel_wise=True)
    return [clip, NormalizeIntensityd("image", channel_wise=True)]


def _transformed(affine: Float[np.ndarray, "4 4"], positions: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3"]:
    return positions @ affine[:3, :3].T + affine[:3, 3]


def _shift(slices: int) -> Float[np.ndarray, "4 4"]:
    matrix = np.eye(4)
    matrix[2, 3] = slices
    return matrix


def original_intensities(image: Float[Tensor, "*shape"], data: Data) -> Float[Tensor, "*shape"]:
    """Hounsfield units from what the window made of them; MR, normalized scan by scan, stays as it is."""
    low, high = data.window_hu
    return (image + 1) / 2 * (high - low) + low if data.modality == "ct" else image
