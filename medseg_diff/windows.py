"""Windows that cover a volume too large for one call, on the grid of the coarse noise."""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

STEP = 16
"""Windows, of training sizes, start at multiples of this; the last ends with the volume, as padded for the network.

Either way a window starts at a multiple of the network's `STRIDE`, so that the coarse grids coincide.
"""


@dataclass(frozen=True)
class Window:
    """A box of the padded volume, and the core of it whose answers count; the cores tile the volume."""

    start: tuple[int, ...]
    size: tuple[int, ...]
    core: tuple[slice, ...]


def pad_to_stride(space: tuple[int, ...], widths: tuple[int, ...]) -> tuple[int, ...]:
    """The next lengths that every level of the network fits. No more: padding is part of what the group norms see.

    At least two voxels are left at the deepest level, since a norm of one alone is not defined.
    """
    stride = 2 ** (len(widths) - 1)
    return tuple(max(2, -(-n // stride)) * stride for n in space)


def windows(space: tuple[int, ...], padded: tuple[int, ...], size: tuple[int, ...]) -> list[Window]:
    """One window where the padded volume is at most four times the training size; else windows that overlap by half."""
    if np.prod(padded) <= 4 * np.prod(size):
        size = padded
    size = tuple(min(s, p) for s, p in zip(size, padded, strict=True))
    starts = [_starts(p, s) for p, s in zip(padded, size, strict=True)]
    cores = [_cores(a, s, n) for a, s, n in zip(starts, size, space, strict=True)]
    pairs = [list(zip(a, c, strict=True)) for a, c in zip(starts, cores, strict=True)]
    corners = (tuple(zip(*corner, strict=True)) for corner in itertools.product(*pairs))
    found = [Window(start, size, core) for start, core in corners]
    return [window for window in found if all(c.start < c.stop for c in window.core)]  # some hold only padding


def importance(size: tuple[int, ...]) -> Float[Tensor, "*size"]:
    """A Gaussian around the centre: where windows overlap, the middle of one counts more than the rim of another."""
    result = torch.ones(())
    for length in size:
        distance = (torch.arange(length) - (length - 1) / 2) / (length / 4)
        result = result[..., None] * torch.exp(-0.5 * distance**2).clamp_min(1e-3)
    return result


def _starts(length: int, size: int) -> list[int]:
    step = max(STEP, size // 2 // STEP * STEP)
    return [*range(0, length - size, step), length - size]


def _cores(starts: list[int], size: int, length: int) -> list[slice]:
    """Every voxel belongs to one window: the borders lie in the middle of the overlaps."""
    borders = [0, *((b + a + size) // 2 for a, b in itertools.pairwise(starts)), length]
    return [slice(min(a, length), min(b, length)) for a, b in itertools.pairwise(borders)]
