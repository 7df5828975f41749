"""Label maps as the continuous masks that diffusion needs, and back."""

import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor
from torch.nn import functional

IGNORED = 255
"""Index of voxels whose class is not known: they are left out of every loss and measure."""


def to_analog(p: Float[Tensor, "batch K *space"], b: float) -> Float[Tensor, "batch K *space"]:
    """A one-hot mask or probabilities in [0, 1] as analog bits in [-b, b] (Chen et al. 2023, Analog Bits).

    The smaller b, the earlier the noise hides the mask: large objects need a small b, or the network reads them from
    x_t and never looks at the scan.
    """
    return b * (2 * p - 1)


def from_analog(x: Float[Tensor, "batch K *space"], b: float) -> Float[Tensor, "batch K *space"]:
    """The inverse of `to_analog`, clamped to [0, 1]."""
    return ((x / b + 1) / 2).clamp(0, 1)


def one_hot(label_map: Integer[Tensor, "batch *space"], classes: int) -> Float[Tensor, "batch {classes} *space"]:
    """One channel a class, 1 where the label is its index, none where it is IGNORED.

    Raises RuntimeError (on the CPU) for other labels beyond them.
    """
    batch, *space = label_map.shape
    empty = torch.zeros(batch, classes, *space, device=label_map.device)
    known = label_map != IGNORED
    return empty.scatter_(1, torch.where(known, label_map.long(), 0).unsqueeze(1), known.unsqueeze(1).to(empty))


def to_labels(x: Float[Tensor, "batch K *space"]) -> UInt8[Tensor, "batch *space"]:
    """The index of the largest channel at every voxel, the first of equals; K up to 256.

    Channel by channel: argmax across a stride takes ten times as long on the CPU.
    """
    best = x[:, 0]
    labels = torch.zeros(best.shape, dtype=torch.uint8, device=x.device)
    for index in range(1, x.shape[1]):
        labels = torch.where(x[:, index] > best, labels.new_tensor(index), labels)
        best = torch.maximum(best, x[:, index])
    return labels


def pool(x: Float[Tensor, "batch K *space"], factor: int) -> Float[Tensor, "batch K *reduced"]:
    """The mean over blocks of factor voxels a side, in 2D or 3D. Raises ValueError where blocks do not tile space."""
    space = x.shape[2:]
    if any(size % factor for size in space):
        raise ValueError(f"blocks of {factor} voxels do not tile a grid of {'x'.join(map(str, space))}")
    return functional.avg_pool3d(x, factor) if len(space) == 3 else functional.avg_pool2d(x, factor)


def input_scale(alpha_bar: Float[Tensor, "*batch"], b: float) -> Float[Tensor, "*batch"]:
    """The factor that gives x_t of a mask in [-b, b] unit variance: 1 where b is 1 (Chen 2023, section 3)."""
    return (alpha_bar * b**2 + 1 - alpha_bar).rsqrt()
