"""Augmentation as batched tensor operations, on the device of the batch and in its number of dimensions."""

import math

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor
from torch.nn import functional

ROTATION = math.radians(15)
SCALE = 0.15
SHIFT = 0.06
GAIN, OFFSET, NOISE = 0.25, 0.3, 0.05

MARGIN = 0.125
"""Crops are drawn wider by this part on either side, so that a rotated one has corners."""


def margin_of(size: tuple[int, ...]) -> tuple[int, ...]:
    """Voxels to draw around a training size."""
    return tuple(math.ceil(length * MARGIN) for length in size)


def augment(
    image: Float[Tensor, "batch channels *space"],
    labels: Num[Tensor, "batch *space"],
    size: tuple[int, ...],
    spacing_mm: tuple[float, ...],
    generator: torch.Generator,
    fill: float = 0.0,
) -> tuple[Float[Tensor, "batch channels *size"], Int[Tensor, "batch *size"]]:
    """Rotates by up to 15 degrees a plane (in mm), scales by up to e^.15, shifts by up to 6 %; gain, offset, noise."""
    batch, space = len(image), image.shape[2:]
    grid = _grid(batch, space, size, spacing_mm, generator).to(image.dtype)
    warped = functional.grid_sample(image - fill, grid, align_corners=True) + fill  # it samples 0 outside
    nearest = functional.grid_sample(labels[:, None].float(), grid, mode="nearest", align_corners=True)[:, 0]
    gain = torch.exp(_uniform((batch, 1), GAIN, generator))
    offset = _uniform((batch, 1), OFFSET, generator)
    flat = warped.flatten(1)
    noise = torch.randn(flat.shape, generator=generator, device=generator.device)
    return (flat * gain + offset + NOISE * noise).reshape(warped.shape), nearest.long()


def _grid(
    batch: int, space: tuple[int, ...], size: tuple[int, ...], spacing_mm: tuple[float, ...], generator: torch.Generator
) -> Float[Tensor, "batch *size dims"]:
    """Where every voxel of the result is found, in grid_sample's coordinates (last axis first, -1 to 1)."""
    dims, device = len(size), generator.device
    spacing = torch.tensor(spacing_mm, device=device)
    matrix = _rotations(batch, dims, generator) * torch.exp(_uniform((batch, 1, 1), SCALE, generator))
    matrix = matrix * spacing[None, None, :] / spacing[None, :, None]
    shift = _uniform((batch, dims), SHIFT, generator) * torch.tensor(size, device=device)
    axes = [torch.arange(n, device=device) - (n - 1) / 2 for n in size]
    voxels = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    found = torch.einsum("bij,...j->b...i", matrix, voxels) + shift.reshape(batch, *(1,) * dims, dims)
    half = (torch.tensor(space, device=device) - 1) / 2
    return (found / half).flip(-1)


def _rotations(batch: int, dims: int, generator: torch.Generator) -> Float[Tensor, "batch dims dims"]:
    """Product of a small rotation in every plane of two axes."""
    result = torch.eye(dims, device=generator.device).repeat(batch, 1, 1)
    for i in range(dims):
        for j in range(i):
            angle = _uniform((batch,), ROTATION, generator)
            plane = torch.eye(dims, device=generator.device).repeat(batch, 1, 1)
            plane[:, i, i] = plane[:, j, j] = angle.cos()
            plane[:, i, j], plane[:, j, i] = -angle.sin(), angle.sin()
            result = result @ plane
    return result


def _uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    return (2 * torch.rand(shape, generator=generator, device=generator.device) - 1) * bound
