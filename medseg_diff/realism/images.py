"""Images to judge, from a folder that `medseg-diff generate` wrote, and real ones cut as training cuts them."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int, UInt8
from torch import Tensor

from medseg_diff.config import Config, Data
from medseg_diff.config_file import parse_config
from medseg_diff.console import progress, say
from medseg_diff.datasets.cache import Volume, load_volumes
from medseg_diff.datasets.layouts import Case, Dataset, split
from medseg_diff.datasets.pipeline import outside, preprocessing
from medseg_diff.datasets.slices import draw_batch
from medseg_diff.errors import UserError, reason
from medseg_diff.scans.read import read_label_map, read_scan

ABOUT = "generation.json"
FEWEST = 8
MOST = 5000
MOST_VOXELS = 2**26
"""Of a set of images: a quarter of a gigabyte."""


@dataclass(frozen=True)
class Generated:
    """Generated images, their masks where there are some, and how they came about."""

    names: tuple[str, ...]
    images: Float32[Tensor, "n channels *size"]
    masks: Int[np.ndarray, "n *size"] | None
    config: Config
    about: dict[str, Any]


def read_generated(folder: Path, dataset: Dataset) -> Generated:
    """The images of a folder with the masks beside them, which must fit the labels of a data set. Raises UserError.

    Of very many, the first are read (MOST, MOST_VOXELS), which a line on stderr says.
    """
    about = _about(folder)
    try:
        config = parse_config(about["config"], folder / ABOUT)
    except UserError as error:
        raise UserError(error.where, error.what, _ADVICE) from error
    if config.data.spacing_mm is None:
        raise UserError(folder / ABOUT, "its configuration has no voxel size", _ADVICE)
    found = sorted(path for path in folder.glob("image_*.nii.gz") if not path.name.endswith("_seg.nii.gz"))
    if len(found) < FEWEST:
        what = f"it holds {len(found)} images, and fewer than {FEWEST} say nothing about a distribution"
        raise UserError(folder, what, "Generate more of them with --count; 200 are a good number.")
    most = most_images(config.data.size)
    if len(found) > most:
        say(f"{folder} holds {len(found)} images; the first {most} are evaluated")
    paths = found[:most]
    with progress("reading images", len(paths)) as advance:
        images, masks = [], []
        for path in paths:
            scan = read_scan(path, len(dataset.channels))
            images.append(_normalized(_fitting(scan.array, path, config.data), config.data))
            mask = path.with_name(path.name.replace(".nii.gz", "_seg.nii.gz"))
            if mask.exists():
                masks.append(_known(_fitting(read_label_map(mask)[0][None], mask, config.data)[0], mask, dataset))
            advance()
    if masks and len(masks) < len(paths):
        what = f"{len(paths) - len(masks)} of {len(paths)} images have no mask beside them"
        raise UserError(folder, what, "Generate them again, or remove all the masks.")
    names = tuple(path.name.removesuffix(".nii.gz") for path in paths)
    stacked = torch.from_numpy(np.stack(images))
    return Generated(names, stacked, np.stack(masks) if masks else None, config, about)


def most_images(size: tuple[int, ...]) -> int:
    """How many images of a size are kept in memory."""
    return max(FEWEST, min(MOST, MOST_VOXELS // math.prod(size)))


def load_split(dataset: Dataset, data: Data, *, labelled: bool) -> tuple[list[Volume], list[Volume]]:
    """Volumes of the training and of the held-out cases, prepared as for training. Raises UserError."""
    parts = split(dataset, data.folds, data.fold)
    bare = [case.name for case in parts[1] if not case.labels]
    if labelled and bare:
        what = f"{len(bare)} held-out cases have no label map to compare the masks with, the first is {bare[0]}"
        raise UserError(dataset.root, what, "Label them, or remove the masks from the generated images.")
    how, cache = preprocessing(data), Data.model_fields["cache"].default
    with progress("preparing volumes", sum(map(len, parts))) as advance:

        def load(cases: Sequence[Case]) -> list[Volume]:
            values, channels = list(dataset.labels), len(dataset.channels)
            return load_volumes(
                cases, how, values=values, channels=channels, folder=cache, progress=lambda _: advance()
            )

        return load(parts[0]), load(parts[1])


def draw_crops(
    volumes: Sequence[Volume], data: Data, count: int, seed: tuple[int, ...]
) -> tuple[Float32[Tensor, "n channels *size"], UInt8[Tensor, "n *size"]]:
    """Images and indices of labels, drawn as training draws them, without augmentation; a function of the seed."""
    return draw_batch(
        volumes,
        np.random.default_rng(seed),
        batch_size=count,
        size=data.size,
        margin=(0,) * len(data.size),
        axis=data.axis,
        neighbours=0,
        foreground=data.foreground,
        fill=outside(data.modality),
    )


def stack_of(volume: Volume, data: Data) -> Float32[Tensor, "slices channels *space"]:
    """All slices of a volume; of 3 dimensions, the volume alone."""
    return volume.image[None] if data.spatial_dims == 3 else volume.image.movedim(data.axis + 1, 0)


_ADVICE = "Name a folder that medseg-diff generate wrote."


def _about(folder: Path) -> dict[str, Any]:
    path = folder / ABOUT
    if not path.is_file():
        raise UserError(folder, f"there is no {ABOUT} that says how its images came about", _ADVICE)
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(path, f"it is not readable ({reason(error)})", _ADVICE) from error
    if not isinstance(about, dict) or "config" not in about:
        raise UserError(path, "it does not hold the configuration of a model", _ADVICE)
    return about


def _fitting(array: np.ndarray, path: Path, data: Data) -> np.ndarray:
    """Channels and `data.size` of what was written; a slice loses its axis."""
    size = list(data.size)
    wanted = size if data.spatial_dims == 3 else [*size[: data.axis], 1, *size[data.axis :]]
    if list(array.shape[1:]) != wanted:
        found, expected = ("x".join(map(str, shape)) for shape in (array.shape[1:], wanted))
        what = f"it is {found} voxels large, and the configuration in {ABOUT} says {expected}"
        raise UserError(path, what, "Keep images of one model in a folder, as medseg-diff generate wrote them.")
    return array.reshape(len(array), *size)


def _normalized(image: np.ndarray, data: Data) -> np.ndarray:
    """The intensities of training: CT is written in Hounsfield units, MR as it is."""
    low, high = data.window_hu
    return (image - low) / (high - low) * 2 - 1 if data.modality == "ct" else image


def _known(mask: np.ndarray, path: Path, dataset: Dataset) -> np.ndarray:
    unknown = sorted(set(np.unique(mask).tolist()) - set(dataset.labels))
    if unknown:
        what = f"it holds the label value {unknown[0]}, and {dataset.root} knows {', '.join(map(str, dataset.labels))}"
        raise UserError(path, what, "Name the data set that the model was trained on.")
    return mask
