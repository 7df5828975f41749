"""MONAI transforms from a scan to the network's grid, and the way back onto the scan's own grid."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from monai.data import ImageReader, MetaTensor
from monai.transforms import (
    ClipIntensityPercentilesd,
    Compose,
    LoadImaged,
    NormalizeIntensityd,
    Orientationd,
    ScaleIntensityRanged,
    Spacingd,
    SpatialResample,
)
from torch import Tensor

from medseg_diff.config import Data
from medseg_diff.scans.read import Scan, read_label_map, read_scan

ReadOne = Callable[[Path], tuple[np.ndarray, np.ndarray]]
"""From a path to an array, channels first, and its affine."""

SLAB_VOXELS = 4_000_000
"""Voxels that are restored at a time: the coordinates of a whole CT would take gigabytes."""


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


class Reader(ImageReader):
    """Lets MONAI's `LoadImaged` read through our checks: every format, nothing half-read."""

    def __init__(self, read_one: ReadOne) -> None:
        super().__init__()
        self.read_one = read_one

    def verify_suffix(self, filename: Any) -> bool:
        """Every file is ours: the content decides."""
        return True

    def read(self, data: Any, **_: Any) -> tuple[np.ndarray, np.ndarray]:
        """The array, channels first, and its affine."""
        return self.read_one(Path(data[0] if isinstance(data, list | tuple) else data))

    def get_data(self, img: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, dict[str, Any]]:
        """The array and what MONAI wants to know of it."""
        array, affine = img
        meta = {"affine": affine, "original_affine": affine, "space": "RAS", "original_channel_dim": 0}
        return array, meta | {"spatial_shape": np.array(array.shape[1:])}


@cache
def loading(channels: int, raters: int) -> Compose:
    """Reads `image`, and the `label_0`, `label_1`, ... of its raters."""

    def image(path: Path) -> tuple[np.ndarray, np.ndarray]:
        scan = read_scan(path, channels)
        return scan.array, scan.affine

    def label(path: Path) -> tuple[np.ndarray, np.ndarray]:
        array, affine = read_label_map(path)
        return array[None].astype(np.int32), affine

    steps = [_load("image", image, np.float32)]
    return Compose(steps + [_load(key, label, np.int32) for key in label_keys(raters)])


def _load(key: str, read_one: ReadOne, dtype: type[np.generic]) -> LoadImaged:
    reader: Any = Reader(read_one)
    return LoadImaged(key, reader=reader, ensure_channel_first=True, dtype=dtype)


def label_keys(raters: int) -> list[str]:
    """Names of the label maps of a case."""
    return [f"label_{rater}" for rater in range(raters)]


@cache
def preparing(how: Preprocessing, raters: int = 0) -> Compose:
    """Orientation (RAS), spacing, intensities: `image` linearly, label maps by the nearest voxel."""
    keys = ["image", *label_keys(raters)]
    modes = ["bilinear"] + ["nearest"] * raters
    return Compose(
        [
            Orientationd(keys, axcodes="RAS", labels=None),
            Spacingd(keys, pixdim=how.spacing_mm, mode=modes, padding_mode="border", dtype=np.float32),
            *_intensities(how),
        ]
    )


def prepare(scan: Scan, how: Preprocessing) -> MetaTensor:
    """The scan on the network's grid: float32 [channels, x, y, z] with its affine."""
    image = MetaTensor(torch.from_numpy(scan.array), affine=torch.from_numpy(scan.affine))
    return preparing(how)({"image": image})["image"]


def restore(volume: Float[Tensor, "x y z"], affine: Float[Tensor, "4 4"], scan: Scan) -> Float[np.ndarray, "i j k"]:
    """A map on the network's grid, interpolated linearly onto the scan's own: by world position, slab by slab."""
    source = MetaTensor(volume[None].float().cpu(), affine=affine)
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


def _intensities(how: Preprocessing) -> list[Any]:
    if how.modality == "ct":
        low, high = how.window_hu
        return [ScaleIntensityRanged("image", low, high, -1.0, 1.0, clip=True)]
    low, high = how.percentiles
    clip = ClipIntensityPercentilesd("image", low, high, channel_wise=True)
    return [clip, NormalizeIntensityd("image", channel_wise=True)]


def _shift(slices: int) -> Float[np.ndarray, "4 4"]:
    matrix = np.eye(4)
    matrix[2, 3] = slices
    return matrix
