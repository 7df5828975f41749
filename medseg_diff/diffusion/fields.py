"""The noise of drawn masks: Gaussian fields of unit variance, from rough to smooth, on the places of a volume.

A field is white noise on cells of SPACINGS voxels, smoothed. It is known wherever its white noise is, so that windows
and slices of one volume see the same.
"""

import torch
from jaxtyping import Float
from torch import Tensor

SPACINGS = (4, 8, 16)
"""Voxels between the cells of each field's white noise."""

WIDTH = 0.6
"""Of the Gaussian that smooths it, in cells."""

REACH = 2
"""Cells beyond which the Gaussian is cut off: so many beyond a box count in it, and no others."""

COARSE = 2
"""Fields are given on a grid this many times coarser than the image's."""


def cells(start: int, length: int, spacing: int) -> range:
    """The cells, along one axis, whose noise reaches the voxels from `start` on."""
    return range(start // spacing - REACH, -(-(start + length) // spacing) + REACH)


def smooth(
    white: Float[Tensor, "*batch x"] | Float[Tensor, "*batch x y"] | Float[Tensor, "*batch x y z"],
    start: tuple[int, ...],
    size: tuple[int, ...],
    spacing: int,
) -> Tensor:
    """White noise on `cells`, one axis for each number of `start`, as a field on the box's grid of half resolution.

    Every value has variance 1 exactly: the weights on each axis have unit norm.
    """
    for axis in range(-1, -len(start) - 1, -1):
        white = along(kernel(start[axis], size[axis], spacing).to(white), white, axis)
    return white


def kernel(start: int, length: int, spacing: int) -> Float[Tensor, "places cells"]:
    """Weights of the cells at the places of a grid of half resolution; rows of unit norm."""
    if start % COARSE or length % COARSE:
        raise ValueError(f"a box from {start}, {length} long, does not fit the grid of {COARSE} voxels; pad it")
    places = start + COARSE * (torch.arange(length // COARSE) + 0.5)
    reached = cells(start, length, spacing)
    centres = spacing * (torch.arange(reached.start, reached.stop) + 0.5)
    distance = (places[:, None] - centres).abs() / spacing
    weights = torch.exp(-0.5 * (distance / WIDTH) ** 2) * (distance < REACH)
    return weights / weights.norm(dim=1, keepdim=True)


def along(matrix: Float[Tensor, "out in"], x: Tensor, axis: int) -> Tensor:
    """The matrix times x along one axis, a negative number."""
    if axis == -1:
        return x @ matrix.T
    flat = x.flatten(axis + 1)
    return (matrix @ flat).unflatten(-1, x.shape[axis + 1 :])


def gumbel(field: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Standard normal numbers as Gumbel ones, by their rank."""
    p = torch.special.ndtr(field.float()).clamp(1e-6, 1 - 1e-6)
    return -torch.log(-torch.log(p))
