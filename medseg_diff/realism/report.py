"""Are generated images real, varied and new? `medseg-diff evaluate --generated`: measures, the audit, pictures."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jaxtyping import Float, Int
from torch import Tensor

from medseg_diff.config import Data, Tracking, flatten, plain
from medseg_diff.console import progress, say
from medseg_diff.datasets.cache import Volume
from medseg_diff.datasets.layouts import Dataset, digest, read_dataset
from medseg_diff.datasets.pipeline import outside
from medseg_diff.figures import draw_strip
from medseg_diff.files import replacing
from medseg_diff.metrics import label_keys
from medseg_diff.realism.features import BATCH, BLOCKS, BOTTLENECK, STEPS, WIDTHS, explained, features, train_extractor
from medseg_diff.realism.images import Generated, draw_crops, load_split, most_images, read_generated, stack_of
from medseg_diff.realism.measures import (
    frechet_distance,
    kernel_distance,
    label_statistics,
    ms_ssim_diversity,
    precision_recall,
)
from medseg_diff.realism.memorization import find_nearest, memorized, nearest_crop, pooling
from medseg_diff.tracking import start_run

HELD_OUT = 1000
"""Held-out images that tell how near to training new images are, if memory allows: a percentile needs many."""

PAIRS = 1000
SHOWN = 8
BESIDE = ("_floor", "_reference")
"""What follows the name of a measure where it is that of training, or held-out, images."""


def evaluate_generated(folder: Path, reference: Path, out: Path, *, seed: int, uri: str | None) -> dict[str, Any]:
    """Judges generated images by the training and the held-out cases of a data set; writes and tracks the result.

    Every distance is between as many generated as held-out images, and its floor between as many training as held-out
    images, since distances depend on the number. Raises UserError.
    """
    dataset = read_dataset(reference)
    generated = read_generated(folder, dataset)
    _warn_of_other_data(generated, dataset)
    data, n = generated.config.data, len(generated.images)
    training, held_out = load_split(dataset, data, labelled=generated.masks is not None)
    real, labels = draw_crops(held_out, data, max(n, min(HELD_OUT, most_images(data.size))), (seed, 0))
    seen, _ = draw_crops(training, data, n, (seed, 1))

    mean, about = _distances(generated.images, real, seen, training, data, seed)
    span = float(real.min()), float(real.max())
    for name, images in (("ms_ssim", generated.images), ("ms_ssim_reference", real)):
        mean[name] = ms_ssim_diversity(images, span, pairs=PAIRS, seed=seed)
    if generated.masks is not None:
        values = np.array(list(dataset.labels))
        mean |= _labels(generated.masks, values[labels.numpy()], dataset, data)
    found, nearest = _audit(generated, real, training, data, out / "nearest.png")
    mean |= found

    summary = {"mean": mean, "features": about, "nearest": nearest, "n": n, "n_reference": len(real)}
    with replacing(out / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    _track(mean, generated, dataset, folder, out, seed=seed, uri=uri)
    return summary


def _warn_of_other_data(generated: Generated, dataset: Dataset) -> None:
    known = generated.about.get("dataset")
    if isinstance(known, dict) and known.get("dataset_digest") not in (None, digest(dataset)):
        say(f"warning: {dataset.root} is not what the model was trained on as it is now: the audit may miss its images")


def table(summary: dict[str, Any]) -> str:
    """Every measure beside its floor, or beside what the held-out images give."""
    mean = summary["mean"]
    rows = [("", "generated", "held-out")]
    for name, value in mean.items():
        other = [mean[name + suffix] for suffix in BESIDE if name + suffix in mean]
        if other:
            rows.append((name, *("-" if number is None else f"{number:.4g}" for number in (value, other[0]))))
    width = max(len(name) for name, *_ in rows)
    return "\n".join(f"{name:{width}}  {value:>10}  {other:>10}" for name, value, other in rows)


def _distances(
    images: Tensor, real: Tensor, seen: Tensor, training: Sequence[Volume], data: Data, seed: int
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """Distances of generated (n), held-out (n or more) and training images (n); the features they are measured in."""
    extractor = train_extractor(
        lambda count, step: draw_crops(training, data, count, (seed, 2, step))[0], seed, steps=STEPS
    )
    a, b, c = (features(extractor, x) for x in (images, real[: len(images)], seen))
    mean: dict[str, float | None] = {}
    for suffix, x in (("", a), ("_floor", c)):
        precision, recall = precision_recall(x, b)
        mean |= {f"frechet{suffix}": frechet_distance(x, b), f"kernel{suffix}": kernel_distance(x, b)}
        mean |= {f"precision{suffix}": precision, f"recall{suffix}": recall}
    dims = data.spatial_dims
    about = {
        "architecture": f"autoencoder trained on the training images: {len(WIDTHS)} strided convolutions to "
        f"{', '.join(map(str, WIDTHS))} channels, a vector of {BOTTLENECK} numbers, and back; the features are that "
        f"vector and the log energy of what it misses in {BLOCKS[dims] ** dims} blocks, each in standard deviations",
        "parameters": sum(parameter.numel() for parameter in extractor.network.parameters()),
        "steps": STEPS,
        "batch": BATCH[dims],
        "training_images": STEPS * BATCH[dims],
        "training_cases": len(training),
        "explained_variance": explained(extractor, real),
    }
    return mean, about


def _labels(
    masks: Int[np.ndarray, "n *size"], real: Int[np.ndarray, "m *size"], dataset: Dataset, data: Data
) -> dict[str, float | None]:
    """label/NAME/present, and mean and standard deviation of volumes in ml, of slices in mm2."""
    assert data.spacing_mm is not None
    spacing = np.array(data.spacing_mm)
    unit, voxel = (
        ("ml", spacing.prod() / 1000) if data.spatial_dims == 3 else ("mm2", np.delete(spacing, data.axis).prod())
    )
    mean: dict[str, float | None] = {}
    for value, key in label_keys(dataset.labels).items():
        for suffix, x in (("", masks), ("_reference", real)):
            present, extent, std = label_statistics(x, value, float(voxel))
            found = {"present": present, f"mean_{unit}": extent, f"std_{unit}": std}
            mean |= {f"label/{key}/{name}{suffix}": number for name, number in found.items()}
    return mean


def _audit(
    generated: Generated, real: Tensor, training: Sequence[Volume], data: Data, picture: Path
) -> tuple[dict[str, float | None], list[dict[str, Any]]]:
    """Nearest training crops of generated and of held-out images, the nearest of all first."""
    n, fill, stacks = len(generated.images), outside(data.modality), [stack_of(volume, data) for volume in training]
    images = torch.cat([generated.images, real])
    factor = pooling(images, stacks)
    with progress("searching training images", len(stacks)) as advance:
        found = find_nearest(images, stacks, fill=fill, factor=factor, progress=lambda _: advance())
    distances = np.array([nearest.distance for nearest in found])
    share, threshold = memorized(distances[:n], distances[n:])
    mean: dict[str, float | None] = {
        "nearest_distance": float(np.median(distances[:n])),
        "nearest_distance_reference": float(np.median(distances[n:])),
        "memorized": share,
        "memorized_floor": float((distances[n:] < threshold).mean()),
        "memorized_threshold": threshold,
        "memorized_pooling": factor,
    }
    order = np.argsort(distances[:n], kind="stable").tolist()
    shown = [(generated.images[i], found[i], generated.names[i]) for i in order[:SHOWN]]
    above = [(f"{name}\ndistance {nearest.distance:.3f}", _plane(image)) for image, nearest, name in shown]
    below = [
        (training[at.volume].name, _plane(nearest_crop(stacks[at.volume], at, data.size, fill))) for _, at, _ in shown
    ]
    draw_strip([above, below], _aspect(data), picture)
    return mean, [
        {
            "image": generated.names[i],
            "distance": found[i].distance,
            "case": training[found[i].volume].name,
            "slice": found[i].index if data.spatial_dims == 2 else None,
            "start": list(found[i].start),
        }
        for i in order
    ]


def _plane(image: Float[Tensor, "channels *size"]) -> Float[np.ndarray, "rows columns"]:
    """The first channel; of a volume its middle slice."""
    plane = image[0].numpy()
    return np.rot90(plane if plane.ndim == 2 else plane[..., plane.shape[-1] // 2])


def _aspect(data: Data) -> float:
    assert data.spacing_mm is not None
    across, up = np.delete(data.spacing_mm, data.axis if data.spatial_dims == 2 else 2)
    return float(up / across)


def _track(
    mean: dict[str, float | None],
    generated: Generated,
    dataset: Dataset,
    folder: Path,
    out: Path,
    *,
    seed: int,
    uri: str | None,
) -> None:
    config, about = generated.config, generated.about
    made = {key: about.get(key) for key in ("seed", "steps", "sampler")}
    options = {"generated": folder.name, "reference": dataset.root.name, "seed": seed}
    parameters = flatten({"evaluate": options, "generate": made, **plain(config)})
    tags = {"dataset": dataset.name, "dataset_digest": digest(dataset)}
    if isinstance(about.get("model"), dict):
        tags["model_digest"] = str(about["model"].get("digest"))
    store = uri or os.environ.get("MLFLOW_TRACKING_URI") or Tracking().uri
    tracker = start_run(store, config.tracking.experiment, f"evaluate {folder.name}", parameters, tags)
    tracker.log({f"generated/{name}": value for name, value in mean.items()}, 0)
    for path in (out / "summary.json", out / "nearest.png"):
        tracker.artifact(path)
    tracker.text("config.yaml", yaml.safe_dump(plain(config), sort_keys=False))
    tracker.finish(ok=True)
