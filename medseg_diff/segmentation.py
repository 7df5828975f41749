"""A scan to its mask and its uncertainty, in memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Integer

from medseg_diff.checkpoint import Model
from medseg_diff.config import MASK_DENOISERS, SAMPLING
from medseg_diff.datasets.pipeline import SLAB_VOXELS, prepare, preprocessing, restore
from medseg_diff.ensemble import LabelReport, Tally, label_reports
from medseg_diff.inference import Prediction, predict
from medseg_diff.scans.read import Scan
from medseg_diff.scans.write import label_dtype
from medseg_diff.uncertainty.calibration import expected_dice

WORKING_BYTES = 1_000_000_000
"""Of a window's activations and of the noise that is kept."""


@dataclass(frozen=True)
class Segmentation:
    """A label map with the data set's own values, on the scan's grid, and all that is known about it."""

    label_map: Integer[np.ndarray, "x y z"]
    uncertainty: Float[np.ndarray, "x y z"]
    labels: tuple[LabelReport, ...]
    prediction: Prediction
    affine: Float[torch.Tensor, "4 4"]


def needed_bytes(model: Model, scan: Scan, samples: int) -> int:
    """The memory that `segment_scan` and writing its results will claim at most, beside the scan that is there.

    Three times are the worst: when the scan is smoothed and resampled, when windows are fused, when the last class is
    brought back and compared. benchmarks/memory.py measures what is taken.
    """
    config = model.about.config
    assert config.data.spacing_mm is not None, "training fills in the spacing"
    channels, voxels = len(scan.array), int(np.prod(scan.shape))
    grid = voxels * scan.voxel_ml * 1000 / float(np.prod(config.data.spacing_mm))
    network = 4 * (channels + len(model.about.labels)) * grid
    masks = samples * grid if config.network.kind in MASK_DENOISERS and config.segment.fuse == "staple" else 0
    preparing = 12 * channels * voxels + 32 * grid
    predicting = network + 4 * grid + masks + WORKING_BYTES
    comparing = network + 8 * grid + 17 * voxels + 100 * SLAB_VOXELS
    return int(max(preparing, predicting, comparing))


def segment_scan(
    model: Model,
    scan: Scan,
    *,
    samples: int,
    steps: int,
    seed: int,
    keep: Path | None = None,
    progress: Callable[[float], object] = lambda share: None,
) -> Segmentation:
    """The most probable label of every voxel, and 1 - its probability as the uncertainty.

    A model that was calibrated gives its probabilities at its temperature, and stretched intervals. On the network's
    grid no mask changes by it; where a scan lies on another, interpolation moves a border voxel here and there.
    `keep` is a folder for the sampled masks; without it they are counted and forgotten. `progress` as of `predict`.
    """
    prepared = prepare(scan, preprocessing(model.about.config.data))
    image, affine = prepared.as_tensor(), prepared.affine
    values, grid = list(model.about.labels), tuple(image.shape[1:])
    kept = None if keep is None else np.memmap(keep / "samples", np.uint8, "w+", shape=(samples, *grid))
    if (scan.array == scan.array[:, :1, :1, :1]).all():
        prediction = _nothing(len(values), samples, grid, kept)
    else:
        prediction = predict(model, image, samples=samples, steps=steps, seed=seed, keep=kept, progress=progress)
    fitted = model.about.calibration
    factors = {} if fitted is None else fitted.factors(samples, steps)
    best, label_map = np.full(scan.shape, -1, np.float32), np.zeros(scan.shape, label_dtype(values))
    expected = {}
    for index, value in enumerate(values):
        frame = restore(prediction.probabilities[index], affine, scan)
        if value:
            expected[value] = expected_dice(frame)
        _take_better(frame, value, best, label_map)
        del frame  # before the next is made
    grid_voxel_ml = float(torch.linalg.det(affine[:3, :3].double()).abs()) / 1000
    labels = label_reports(
        model.about.labels, label_map, scan.voxel_ml, prediction.tally, grid_voxel_ml, expected, factors
    )
    uncertainty = np.clip(np.subtract(1, best, out=best), 0, 1, out=best)
    return Segmentation(label_map, uncertainty, labels, prediction, affine)


def probability_frames(
    prediction: Prediction, affine: torch.Tensor, scan: Scan
) -> Iterator[Float[np.ndarray, "x y z"]]:
    """The probability of each class on the scan's grid, one class at a time."""
    return (restore(volume, affine, scan) for volume in prediction.probabilities)


def sample_frames(
    segmentation: Segmentation, values: Sequence[int], scan: Scan
) -> Iterator[Integer[np.ndarray, "x y z"]]:
    """Each sampled mask on the scan's grid: class by class, thresholded last."""
    assert segmentation.prediction.samples is not None
    for mask in segmentation.prediction.samples:
        best, label_map = np.zeros(scan.shape, np.float32), np.full(scan.shape, values[0], label_dtype(values))
        for index, value in enumerate(values):
            frame = restore(torch.from_numpy(mask == index).float(), segmentation.affine, scan)
            _take_better(frame, value, best, label_map)
            del frame  # before the next is made
        yield label_map


def drawn(model: Model, samples: int | None, steps: int | None) -> tuple[int, int]:
    """How many samples in how many steps, by default as the model says; a deterministic one draws none."""
    settings = model.about.config.segment
    drawing = model.about.config.network.kind in SAMPLING
    return (samples or settings.samples) if drawing else 0, steps or settings.steps


def _take_better(
    frame: Float[np.ndarray, "x y z"],
    value: int,
    best: Float[np.ndarray, "x y z"],
    label_map: Integer[np.ndarray, "x y z"],
) -> None:
    """Where a class has the best frame so far, its value goes into the map."""
    label_map[frame > best] = value
    np.maximum(best, frame, out=best)


def _nothing(classes: int, samples: int, grid: tuple[int, ...], kept: np.ndarray | None) -> Prediction:
    """The answer for a scan without contrast: background, and no opinion from a network that saw nothing."""
    probabilities = torch.zeros(classes, *grid)
    probabilities[0] = 1
    tally = Tally.empty(samples, classes) if samples else None
    return Prediction(probabilities, tally, kept)
