"""What a data set holds, and the configuration that it asks for."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from medseg_diff.datasets.layouts import Dataset
from medseg_diff.scans.geometry import along_ras
from medseg_diff.scans.read import Scan

PERCENTILES = (0.5, 50.0, 99.5)
ANISOTROPIC = 3.0
"""The longest side of a voxel over the shortest from which slices are learned instead of volumes."""

TRAINING_VOXELS = {2: 2**16, 3: 2**19}
"""The most that are proposed for a training crop, by dimensions."""

BATCH = {2: 16, 3: 2}
STRIDE = 16
AIR_HU = -500.0
"""CT, where no channel says what it is, has its lowest values below."""


@dataclass(frozen=True)
class Contents:
    """What is remembered of a case once its voxels are gone.

    Attributes:
        digest: SHA-256 of the intensities.
        shape, spacing_mm: along the axes of the file.
        ras_shape, ras_spacing_mm: along right, anterior and superior.
        percentiles: PERCENTILES of every channel.
        labelled: lowest and highest of PERCENTILES where a structure is labelled; none where none is.
        volumes_ml: by label value, one mapping a label file.

    """

    digest: str
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    ras_shape: tuple[int, ...]
    ras_spacing_mm: tuple[float, ...]
    percentiles: Float[np.ndarray, "channels 3"]
    labelled: tuple[float, float] | None
    volumes_ml: list[dict[int, float]]


def contents_of(scan: Scan, label_maps: Sequence[Integer[np.ndarray, "x y z"]], labels: dict[int, str]) -> Contents:
    """Of a case; the label maps that lie on the scan's grid, and the labels that are learned."""
    structure = np.zeros(scan.shape, bool)
    volumes_ml = []
    for label_map in label_maps:
        values, counts = np.unique(label_map, return_counts=True)
        held = {value: count for value, count in zip(values.tolist(), counts.tolist(), strict=True) if value in labels}
        volumes_ml.append({value: count * scan.voxel_ml for value, count in held.items()})
        structure |= np.isin(label_map, [value for value in held if value])
    low, _, high = PERCENTILES
    labelled = np.percentile(scan.array[:, structure], [low, high]) if structure.any() else None
    return Contents(
        digest=hashlib.sha256(scan.array.data).hexdigest(),
        shape=scan.shape,
        spacing_mm=scan.spacing_mm,
        ras_shape=along_ras(scan.affine, scan.shape),
        ras_spacing_mm=along_ras(scan.affine, scan.spacing_mm),
        percentiles=np.percentile(scan.array, PERCENTILES, axis=(1, 2, 3)).T,
        labelled=None if labelled is None else (float(labelled[0]), float(labelled[1])),
        volumes_ml=volumes_ml,
    )


def fingerprint(dataset: Dataset, contents: Sequence[Contents]) -> dict[str, Any]:
    """Over the cases: {"median", "min", "max"} of shapes, spacings, intensities, volumes; a list for the three axes.

    The volume of a label is over the label files that hold it, and `files` counts these; `empty` those without any.
    """
    files = [found for held in contents for found in held.volumes_ml]
    percentiles = np.array([held.percentiles for held in contents])
    volumes = {name: [f[value] for f in files if value in f] for value, name in dataset.labels.items() if value}
    return {
        "cases": len(dataset.cases),
        "raters": sorted({len(case.labels) for case in dataset.cases}),
        "shape": _spread([held.shape for held in contents]),
        "spacing_mm": _spread([held.spacing_mm for held in contents]),
        "intensity_percentile": {
            channel: {f"{p:g}": _spread(percentiles[:, i, j]) for j, p in enumerate(PERCENTILES)}
            for i, channel in enumerate(dataset.channels)
        },
        "volume_ml": {name: {"files": len(ml), **(_spread(ml) if ml else {})} for name, ml in volumes.items()},
        "empty": sum(found.keys() <= {0} for found in files),
    }


def proposal(path: Path, dataset: Dataset, contents: Sequence[Contents]) -> dict[str, Any]:
    """A configuration for the data set at `path`: spacing, dimensions, size, axis and window by what it holds.

    The spacing is the median. Slices are learned where there is one only, or where they lie ANISOTROPIC apart. A crop
    covers the median scan, as far as TRAINING_VOXELS allow. The window of a CT holds what is labelled.
    """
    spacing_mm = np.median([held.ras_spacing_mm for held in contents], axis=0)
    extent_mm = np.median([np.multiply(held.ras_shape, held.ras_spacing_mm) for held in contents], axis=0)
    lengths = extent_mm / spacing_mm
    flat = lengths.min() < 2
    axis = int(lengths.argmin() if flat else spacing_mm.argmax())
    dims = 2 if flat or spacing_mm.max() > ANISOTROPIC * spacing_mm.min() else 3
    data: dict[str, Any] = {"root": str(path), "modality": _modality(dataset, contents)}
    if not any(case.part for case in dataset.cases):
        data["folds"] = max(2, min(5, len(dataset.cases)))
    if data["modality"] == "ct":
        data["window_hu"] = _window(contents)
    data |= {"spacing_mm": [round(float(mm), 4) for mm in spacing_mm], "spatial_dims": dims}
    if dims == 2:
        data |= {"axis": axis, "neighbours": 0 if flat else 1}
        lengths = np.delete(lengths, axis)
    data["size"] = _size(lengths, TRAINING_VOXELS[dims])
    train = {"batch_size": BATCH[dims]}
    return {"task": "segment", "data": data, "train": train, "tracking": {"experiment": dataset.name}}


def _modality(dataset: Dataset, contents: Sequence[Contents]) -> str:
    named = any(name.lower().startswith("ct") for name in (*dataset.channels, dataset.modality))
    unnamed = set(dataset.channels) <= {"image", "unknown"}
    lowest = float(np.median([held.percentiles[0, 0] for held in contents]))
    return "ct" if named or (unnamed and lowest < AIR_HU) else "mr"


def _window(contents: Sequence[Contents]) -> list[float]:
    """Of what is labelled, else of everything; in whole tens."""
    bounds = [held.labelled or (held.percentiles[:, 0].min(), held.percentiles[:, -1].max()) for held in contents]
    low, high = np.median(bounds, axis=0)
    return [10.0 * math.floor(low / 10), 10.0 * (math.floor(high / 10) + 1)]


def _size(lengths: Float[np.ndarray, "dims"], voxels: int) -> list[int]:
    """The nearest multiples of STRIDE, the longest shortened until they hold so few voxels."""
    size = [max(STRIDE, STRIDE * round(float(length) / STRIDE)) for length in lengths]
    while math.prod(size) > voxels:
        size[size.index(max(size))] -= STRIDE
    return size


def _spread(values: Any) -> dict[str, Any]:
    return {
        name: function(np.asarray(values), axis=0).tolist()
        for name, function in (("median", np.median), ("min", np.min), ("max", np.max))
    }
