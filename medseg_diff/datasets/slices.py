"""Crops of volumes and of slices with their neighbours; the same code for 2 and 3 dimensions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from medseg_diff.datasets.cache import Volume


def with_neighbours(
    volume: Float[Tensor, "channels slices rows columns"], neighbours: int, chosen: slice = slice(None)
) -> Float[Tensor, "chosen stacked rows columns"]:
    """Slices, each with its neighbours on either side as further channels; beyond the end stands the outermost."""
    count = volume.shape[1]
    middle = torch.arange(count, device=volume.device)[chosen]
    offsets = torch.arange(-neighbours, neighbours + 1, device=volume.device)
    index = (middle[:, None] + offsets).clamp(0, count - 1)
    return volume[:, index].permute(1, 0, 2, 3, 4).flatten(1, 2)


def draw_batch(
    volumes: Sequence[Volume],
    rng: np.random.Generator,
    *,
    batch_size: int,
    size: tuple[int, ...],
    margin: tuple[int, ...],
    axis: int,
    neighbours: int,
    foreground: float,
    fill: float = 0.0,
) -> tuple[Float[Tensor, "batch channels *space"], UInt8[Tensor, "batch *space"]]:
    """Random crops: of volumes where `size` has three numbers, of slices across `axis` where it has two.

    The share `foreground` is centred on a voxel of a random class, the rest anywhere. Of several raters one is drawn.
    `margin` is added on either side of the crop. Beyond the volume lie `fill` and the background.
    """
    crops = [
        _crop(volumes[i], rng, size, margin, axis, neighbours, foreground, fill)
        for i in rng.integers(len(volumes), size=batch_size)
    ]
    images, labels = zip(*crops, strict=True)
    return torch.stack(images), torch.stack(labels)


def _crop(
    volume: Volume,
    rng: np.random.Generator,
    size: tuple[int, ...],
    margin: tuple[int, ...],
    axis: int,
    neighbours: int,
    foreground: float,
    fill: float,
) -> tuple[Tensor, Tensor]:
    shape = np.array(volume.image.shape[1:])
    labels = (
        volume.labels[rng.integers(len(volume.labels))]
        if len(volume.labels)
        else torch.zeros(*shape, dtype=torch.uint8)
    )
    if volume.centres and rng.random() < foreground:
        positions = volume.centres[rng.integers(len(volume.centres))]
        centre = positions[rng.integers(len(positions))]
    else:
        centre = rng.integers(shape)
    image = volume.image
    if len(size) == 2:
        image, labels = image.movedim(axis + 1, 1), labels.movedim(axis, 0)
        index = int(centre[axis])
        image = with_neighbours(image, neighbours, slice(index, index + 1))[0]
        labels = labels[index]
        centre, shape = np.delete(centre, axis), np.delete(shape, axis)
    start = [_start(int(c), int(n), s, rng) - m for c, n, s, m in zip(centre, shape, size, margin, strict=True)]
    wide = [s + 2 * m for s, m in zip(size, margin, strict=True)]
    return cut(image, start, wide, fill), cut(labels, start, wide)


def _start(centre: int, length: int, size: int, rng: np.random.Generator) -> int:
    """Where a crop that holds the centre begins; a structure smaller than the crop may lie anywhere in it."""
    if length <= size:
        return -((size - length) // 2)
    return int(np.clip(centre - size // 2 + rng.integers(-(size // 4), size // 4 + 1), 0, length - size))


def cut(x: Tensor, start: Sequence[int], size: Sequence[int], fill: float = 0.0) -> Tensor:
    """The box of `size` at `start` in the last dimensions, `fill` where it lies outside."""
    lengths = x.shape[-len(size) :]
    inner = tuple(slice(max(0, a), min(n, a + s)) for a, s, n in zip(start, size, lengths, strict=True))
    margins = [(max(0, -a), max(0, a + s - n)) for a, s, n in zip(start, size, lengths, strict=True)]
    index: Any = (..., *inner)
    return functional.pad(x[index], [side for pair in reversed(margins) for side in pair], value=fill)
