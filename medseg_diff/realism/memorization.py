"""Are generated images copies of training images? The nearest training crop of each, wherever it may have been cut."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.nn import functional

from medseg_diff.datasets.slices import cut

LONGEST = 64
"""Voxels along a side of an image that are compared; longer ones are pooled, and their training volumes with them."""

MOST_WORK = 2**35
"""Voxels times pairs of an image and a training volume that are searched; beyond it, everything is pooled more."""

SHORTEST = 8
"""Pooling leaves this many voxels along every side."""

TOGETHER = 2**24
"""Voxels times pairs in memory."""

FEW_POSITIONS = 1024
"""Up to so many places of a crop in a volume, sums are quicker than Fourier transforms."""

FLAT = 1e-4
"""Variance below which a crop has no content to compare."""


@dataclass(frozen=True)
class Nearest:
    """The training crop that is nearest to an image: its volume, slice (0 in volumes) and first voxel."""

    distance: float
    volume: int
    index: int
    start: tuple[int, ...]


def find_nearest(
    images: Float[Tensor, "n channels *size"],
    stacks: Sequence[Float[Tensor, "_ channels ..."]],
    *,
    fill: float,
    factor: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Nearest]:
    """For every image the nearest of all crops of its size, at every shift by whole voxels, of all slices or volumes.

    The distance is sqrt(2 (1 - NCC)), that between two images of mean 0 and norm 1 (each channel has a mean of its
    own): 0 for a copy with whatever offset and positive gain, sqrt(2) where nothing is in common. Mirrored and turned
    copies are not searched for. A crop lies within the volume, which `fill` extends where it is smaller, as in
    training. Images and stacks are pooled by `factor` first, which leaves shifts by whole pooled voxels. A stack is
    the slices of a case, or its volume alone.
    """
    size = tuple(images.shape[2:])
    templates = _unit(_pooled(images, factor))
    best = torch.full((len(images),), -torch.inf)
    where = torch.zeros(len(images), 2, dtype=torch.int64)  # stack, and the number of the slice and position in it
    for number, stack in enumerate(stacks):
        ncc, place = _best_match(_pooled(_extended(stack, size, fill), factor), templates)
        where[ncc > best] = functional.pad(place[:, None], (1, 0), value=number)[ncc > best]
        best = torch.maximum(best, ncc)
        progress(1)
    return [
        _nearest(float(ncc), number, place, stacks[number], size, factor)
        for ncc, (number, place) in zip(best, where.tolist(), strict=True)
    ]


def nearest_crop(
    stack: Float[Tensor, "slices channels *space"], found: Nearest, size: Sequence[int], fill: float
) -> Float[Tensor, "channels *size"]:
    """The crop that was found, in full resolution."""
    return cut(stack[found.index], found.start, size, fill)


def memorized(
    generated: Float64[np.ndarray, "n"], held_out: Float64[np.ndarray, "m"], share: float = 0.01
) -> tuple[float, float]:
    """Share of the generated images nearer to training than all but `share` of the held-out images, and that distance.

    `share` is what is to be expected of images as new, and as sharp, as the held-out ones: an image that is smoother is
    nearer to every other.
    """
    threshold = float(np.quantile(held_out, share))
    return float((generated < threshold).mean()), threshold


def pooling(images: Float[Tensor, "n channels *size"], stacks: Sequence[Float[Tensor, "_ channels ..."]]) -> int:
    """The least factor for `find_nearest` that keeps the sides and the work within LONGEST and MOST_WORK."""
    size, factor = images.shape[2:], 1
    work = len(images) * sum(len(x) * math.prod(map(max, x.shape[2:], size)) for x in stacks)
    while max(size) > LONGEST * factor or work > MOST_WORK * factor ** len(size):
        if min(size) < SHORTEST * (factor + 1):
            break
        factor += 1
    return factor


def _best_match(
    volume: Float[Tensor, "slices channels *space"], templates: Float[Tensor, "n channels *size"]
) -> tuple[Float[Tensor, "n"], Int64[Tensor, "n"]]:
    """Largest NCC of every template, and its number among all slices and positions. A flat crop counts 0."""
    size = templates.shape[2:]
    total, squares = (_window_sums(x, size) for x in (volume.double(), volume.double() ** 2))
    energy = (squares - total**2 / math.prod(size)).sum(1, keepdim=True)
    scale = torch.where(energy > FLAT * templates[0].numel(), energy.clamp_min(FLAT).rsqrt(), 0.0).float()
    together = max(1, TOGETHER // (len(volume) * math.prod(volume.shape[2:])))
    found = [
        (_correlation(volume, part) * scale).transpose(0, 1).flatten(1).max(1) for part in templates.split(together)
    ]
    return torch.cat([ncc for ncc, _ in found]), torch.cat([place for _, place in found])


def _correlation(
    volume: Float[Tensor, "slices channels *space"], templates: Float[Tensor, "n channels *size"]
) -> Float[Tensor, "slices n *positions"]:
    """Sum of products at every position where the template lies within."""
    space, size = volume.shape[2:], templates.shape[2:]
    positions = [n - s + 1 for n, s in zip(space, size, strict=True)]
    if math.prod(positions) <= FEW_POSITIONS:
        return (functional.conv2d if len(size) == 2 else functional.conv3d)(volume, templates)
    dims = tuple(range(-len(size), 0))
    spectra = torch.fft.rfftn(volume, s=space, dim=dims), torch.fft.rfftn(templates, s=space, dim=dims).conj()
    product = torch.einsum("bc...,nc...->bn...", *spectra)
    return torch.fft.irfftn(product, s=space, dim=dims)[(..., *map(slice, positions))]


def _window_sums(
    x: Float[Tensor, "slices channels *space"], size: Sequence[int]
) -> Float[Tensor, "slices channels *positions"]:
    for dim, length in enumerate(size, start=2):
        running = torch.cat([torch.zeros_like(x.narrow(dim, 0, 1)), x.cumsum(dim)], dim)
        count = x.shape[dim] - length + 1
        x = running.narrow(dim, length, count) - running.narrow(dim, 0, count)
    return x


def _unit(images: Float[Tensor, "n channels *size"]) -> Float[Tensor, "n channels *size"]:
    """Mean 0 in each channel, norm 1 over all; a flat image becomes 0."""
    space = tuple(range(2, images.ndim))
    centred = images - images.mean(space, keepdim=True)
    norm = centred.flatten(1).norm(dim=1).reshape(-1, *(1,) * (images.ndim - 1))
    return torch.where(norm**2 > FLAT * images[0].numel(), centred / norm, 0.0)


def _pooled(x: Float[Tensor, "n channels *space"], factor: int) -> Float[Tensor, "n channels *smaller"]:
    return x if factor == 1 else (functional.avg_pool2d if x.ndim == 4 else functional.avg_pool3d)(x, factor)


def _extended(
    x: Float[Tensor, "n channels *space"], size: Sequence[int], fill: float
) -> Float[Tensor, "n channels *larger"]:
    """As draw_batch does where a volume is smaller than the crop."""
    return cut(x, _before(x, size), [max(n, s) for n, s in zip(x.shape[2:], size, strict=True)], fill)


def _before(x: Tensor, size: Sequence[int]) -> list[int]:
    """First voxel of the extended volume in coordinates of the volume."""
    return [-(max(0, s - n) // 2) for n, s in zip(x.shape[2:], size, strict=True)]


def _nearest(ncc: float, volume: int, place: int, stack: Tensor, size: tuple[int, ...], factor: int) -> Nearest:
    positions = [(max(n, s)) // factor - s // factor + 1 for n, s in zip(stack.shape[2:], size, strict=True)]
    index, *start = (int(i) for i in np.unravel_index(place, (len(stack), *positions)))
    first = tuple(i * factor + b for i, b in zip(start, _before(stack, size), strict=True))
    return Nearest(math.sqrt(max(0.0, 2 - 2 * ncc)), volume, index, first)
