"""Scans from memory, under the same checks as files, and results as nibabel images."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from jaxtyping import Float, Shaped

from medseg_diff.errors import UserError
from medseg_diff.scans.geometry import check_geometry, header_for
from medseg_diff.scans.itk import affine_of, voxels
from medseg_diff.scans.nifti import MM_PER_UNIT
from medseg_diff.scans.read import Scan, read_scan, trusted

FORMS = "a path, a nibabel image, a SimpleITK image, or a pair (array of x y z or channels x y z, RAS affine in mm)"


def scan_of(given: Any, channels: int) -> Scan:
    """A scan from one of FORMS. UserError if it can't be trusted, ValueError for anything else."""
    match given:
        case str() | Path():
            return read_scan(given, channels)
        case sitk.Image():
            name, values, affine = "SimpleITK image", voxels(given), affine_of(given)
        case nib.spatialimages.SpatialImage():
            name, values, affine = "nibabel image", *_from_nibabel(given)
        case (np.ndarray() as array, affine):
            name, values, affine = "array", array if array.ndim == 4 else array[None], np.array(affine, np.float64)
        case _:
            raise ValueError(f"a scan is {FORMS}, not {type(given).__name__}")
    if values.ndim != 4 or affine.shape != (4, 4):
        raise ValueError(f"a scan is {FORMS}; this {name} has the shape {values.shape}, its affine {affine.shape}")
    where, (frames, *shape) = Path(name), values.shape
    if values.dtype.kind not in "biuf":
        raise UserError(where, f"its voxels are {values.dtype}", "Convert it to integer or float32 gray values.")
    if frames != channels or not values.size:
        raise UserError(where, f"it holds {frames} values a voxel where {channels} are read", "Give every channel.")
    warnings = check_geometry(where, affine, tuple(shape))
    return trusted(where, values, affine, header_for(affine, tuple(shape)), "nifti", warnings)


def to_nibabel(array: Shaped[np.ndarray, "*frames x y z"], affine: Float[np.ndarray, "4 4"]) -> nib.Nifti1Image:
    """A NIfTI image of one frame, or of several, which come last then."""
    frames_last = np.moveaxis(array, 0, -1) if array.ndim == 4 else array
    header = header_for(affine, frames_last.shape)
    header.set_data_dtype(array.dtype)
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    return kind(frames_last, affine, header)


def _from_nibabel(image: Any) -> tuple[np.ndarray, np.ndarray]:
    values = np.asanyarray(image.dataobj)
    values = values.reshape((*(*values.shape, 1, 1)[:3], -1)) if values.size else values
    unit = int(image.header["xyzt_units"]) & 7 if isinstance(image, nib.Nifti1Pair) else 2
    scale = np.diag([*3 * [MM_PER_UNIT.get(unit, 1.0)], 1.0])
    return np.moveaxis(values, -1, 0), scale @ np.asarray(image.affine, np.float64)
