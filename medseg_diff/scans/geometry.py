"""Affines that a scan may have, and the NIfTI header for one."""

import itertools
from pathlib import Path
from typing import TypeVar

import nibabel as nib
import numpy as np
from jaxtyping import Float, Shaped

from medseg_diff.errors import UserError
from medseg_diff.machine import free_memory_bytes

T = TypeVar("T")

VOXEL_LIMIT = 2**30  # 1024^3: 4 GiB as float32
BYTES_A_VOXEL = 24  # the least: the file's numbers, the same in float32, a probability, an uncertainty, a mask
SPACING_RANGE_MM = (0.02, 50.0)
AFFINE_TOLERANCE = 1e-3


def spacing_of(affine: Float[np.ndarray, "4 4"]) -> tuple[float, float, float]:
    """Voxel size along each array axis, in the affine's unit."""
    x, y, z = (float(length) for length in np.linalg.norm(affine[:3, :3], axis=0))
    return x, y, z


def check_geometry(path: Path, affine: Float[np.ndarray, "4 4"], shape: tuple[int, ...]) -> list[str]:
    """Warnings about a scan's affine (in mm) and shape; UserError where no mask could be laid on it, or held."""
    if min(shape) < 1:
        raise UserError(path, "it holds no voxels: an axis has length 0", "Export the scan again.")
    if np.prod(shape, dtype=float) > VOXEL_LIMIT:
        size = " x ".join(map(str, shape))
        raise UserError(path, f"it claims {size} voxels, more than the {VOXEL_LIMIT} that are read", "Crop the scan.")
    needed, free = BYTES_A_VOXEL * int(np.prod(shape)), free_memory_bytes()
    if needed > free:
        what = f"it needs at least {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
        raise UserError(path, what, "Crop it, resample it to larger voxels, or use a larger machine.")
    if not np.isfinite(affine).all():
        raise UserError(path, "its affine holds NaN or infinite numbers", "Export the scan again with its geometry.")
    spacing = np.array(spacing_of(affine))
    low, high = SPACING_RANGE_MM
    if (spacing < low).any() or (spacing > high).any():
        text = " x ".join(f"{s:g}" for s in spacing)
        raise UserError(
            path,
            f"its voxels measure {text} mm; from {low:g} to {high:g} mm is read",
            "Correct the spacing, or its unit, in the header.",
        )
    directions = affine[:3, :3] / spacing
    if abs(np.linalg.det(directions)) < 1e-3:
        raise UserError(
            path, "its affine is singular: two axes point the same way", "Correct the affine in the header."
        )
    if abs(directions.T @ directions - np.eye(3)).max() > 1e-3:
        return [
            "the axes are not at right angles (sheared affine); the mask is made on a straight grid and brought back"
        ]
    return []


def check_same_grid(
    path: Path,
    shape: tuple[int, ...],
    affine: Float[np.ndarray, "4 4"],
    other: Path,
    other_shape: tuple[int, ...],
    other_affine: Float[np.ndarray, "4 4"],
) -> None:
    """UserError where a file does not lie on the grid of another, which it belongs to; both affines are in mm."""
    if shape != other_shape:
        ours, theirs = (" x ".join(map(str, lengths)) for lengths in (shape, other_shape))
        advice = "Draw it on the grid of the other, or resample it to that (labels to the nearest voxel)."
        raise UserError(path, f"its shape is {ours}, that of {other} is {theirs}", advice)
    gap = float(np.abs(affine - other_affine).max())
    if gap > AFFINE_TOLERANCE:
        advice = "If the voxels fit, copy the header of the other into it; if not, resample it to that grid."
        raise UserError(path, f"its affine differs from that of {other} by up to {gap:.3g}", advice)


def largest_shift(a: Float[np.ndarray, "4 4"], b: Float[np.ndarray, "4 4"], shape: tuple[int, ...]) -> float:
    """How far apart two affines place the same corner of a volume, at most."""
    corners = np.array([(*corner, 1) for corner in itertools.product(*((0, n - 1) for n in shape))])
    return float(np.linalg.norm((corners @ (a - b).T)[:, :3], axis=1).max())


def header_for(affine: Float[np.ndarray, "4 4"], shape: tuple[int, ...]) -> nib.Nifti1Header:
    """A header in mm with the affine in sform and qform, both of code 1 (scanner)."""
    header = nib.Nifti1Header() if max(shape) < 2**15 else nib.Nifti2Header()
    header.set_data_shape(shape)
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1)
    header.set_xyzt_units("mm")
    return header


def ras_spacing(affine: Float[np.ndarray, "4 4"]) -> tuple[float, float, float]:
    """Voxel size along right, anterior and superior, whatever the order of the array's axes."""
    right, anterior, superior = along_ras(affine, spacing_of(affine))
    return right, anterior, superior


def along_ras(affine: Float[np.ndarray, "4 4"], of_axes: tuple[T, ...]) -> tuple[T, ...]:
    """What is said of the array's axes, in the order right, anterior, superior."""
    return tuple(of_axes[axis] for axis in np.argsort(nib.io_orientation(affine)[:, 0]))


def reoriented(
    array: Shaped[np.ndarray, "x y z"], affine: Float[np.ndarray, "4 4"], codes: str
) -> tuple[Shaped[np.ndarray, "i j k"], Float[np.ndarray, "4 4"]]:
    """The same volume with its axes leading as `codes` says, such as LPS: every voxel keeps its place in the world."""
    wanted = nib.orientations.axcodes2ornt(codes)
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), wanted)
    turned = nib.orientations.apply_orientation(array, turn)
    return np.ascontiguousarray(turned), affine @ nib.orientations.inv_ornt_aff(turn, array.shape)
