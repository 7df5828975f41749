"""Scans and label maps from files of many kinds, refused with a reason wherever the result could be silently wrong."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Float64, Int, Shaped

from medseg_diff.errors import UserError
from medseg_diff.scans.dicom import read_dicom
from medseg_diff.scans.frames import is_dicom
from medseg_diff.scans.geometry import header_for, spacing_of
from medseg_diff.scans.itk import read_itk
from medseg_diff.scans.nifti import Header, read_nifti

KINDS = {
    ".nii.gz": "nifti", ".nii": "nifti", ".hdr": "nifti", ".nrrd": "nrrd", ".mha": "mha", ".mhd": "mha",
    ".png": "png", ".tif": "tiff", ".tiff": "tiff", ".zip": "dicom",
}  # fmt: skip
NAMED = (".dcm", ".img")
"""Read when they are named, but no scans of a folder: a slice of a series, the voxels of a .hdr."""
LARGEST_VALUE = 1e12  # the squares of a volume of these still sum in float32


@dataclass(frozen=True)
class Scan:
    """An image on its grid.

    Attributes:
        path: the file or folder it came from.
        name: the stem of everything written about it.
        array: finite values.
        affine: voxel index to RAS world, in mm.
        header: the template for files on the same grid; in the file's own unit where that is not mm.
        kind: nifti, nrrd, mha, png, tiff or dicom.
        warnings: sentences about what had to be assumed or mended.
        series: the number or UID of the DICOM series, where one was chosen.

    """

    path: Path
    name: str
    array: Float32[np.ndarray, "channels x y z"]
    affine: Float64[np.ndarray, "4 4"]
    header: Header
    kind: str
    warnings: tuple[str, ...]
    series: str | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along x, y, z."""
        x, y, z = self.array.shape[1:]
        return x, y, z

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along x, y, z."""
        return spacing_of(self.affine)

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000


def read_scan(path: str | Path, channels: int = 1, series: str | None = None) -> Scan:
    """Reads a NIfTI, NRRD, MHA, PNG or TIFF file, a DICOM file, folder or zip; UserError if it can't be trusted.

    `series` is the number or the UID of a DICOM series, for folders of several.
    """
    path = Path(path)
    return trusted(path, *_read(path, channels, series), series)


def trusted(
    path: Path,
    values: Shaped[np.ndarray, "channels x y z"],
    affine: Float64[np.ndarray, "4 4"],
    header: Header,
    kind: str,
    warnings: list[str],
    series: str | None = None,
) -> Scan:
    """A scan of finite float32 values, what was mended among its warnings; UserError where there is nothing to mend."""
    array = _finite_float32(path, values, warnings)
    for channel in array:
        if channel.min() == channel.max():
            warnings.append(f"every voxel has the same value, {channel.flat[0]:g}: there is nothing to segment")
    return Scan(path, scan_name(path), array, affine, header, kind, tuple(warnings), series)


def read_label_map(path: str | Path) -> tuple[Int[np.ndarray, "x y z"], Float64[np.ndarray, "4 4"]]:
    """Reads one integer a voxel, and the affine in mm; UserError for fractions, values below 0, unreadable files."""
    path = Path(path)
    values, affine, *_ = _read(path, channels=1)
    low, high = float(values.min()), float(values.max())
    whole = values.dtype.kind in "iu" or (values == np.round(values)).all()
    if whole and low < 0:
        advice = "Give every label a positive value, also one that marks voxels to ignore, and the background 0."
        raise UserError(path, f"it holds the label value {low:g}", advice)
    if not (whole and high < 2**31):
        raise UserError(path, "it is no label map: it holds fractions, NaN or huge values", "Give one integer a voxel.")
    dtype = np.int16 if high < 2**15 else np.int32
    return np.ascontiguousarray(values[0], dtype), affine


def scan_name(path: Path) -> str:
    """The stem of a scan's outputs: knee.nii.gz -> knee, a folder -> its name."""
    suffix = suffix_of(path) or (path.suffix if path.suffix.lower() in NAMED and path.is_file() else "")
    return path.name[: -len(suffix)] if suffix else path.resolve().name


def suffix_of(path: Path) -> str:
    """That of a kind of scan, as it is written; else nothing."""
    return next((path.name[-len(s) :] for s in KINDS if path.name.lower().endswith(s)), "")


def _read(
    path: Path, channels: int, series: str | None = None
) -> tuple[np.ndarray, np.ndarray, Header, str, list[str]]:
    """Values "channels x y z" as the file has them, affine in mm, header, kind, warnings."""
    if path.suffix.lower() == ".img":
        path = path.with_suffix(".hdr")
    try:
        if not path.exists():
            raise UserError(path, "it does not exist", "Check the path.")
        if not (path.is_dir() or path.is_file()):
            raise UserError(path, "it is neither a file nor a folder", "Give a scan file or a DICOM series folder.")
        kind = "dicom" if path.is_dir() or is_dicom(path) else KINDS.get(suffix_of(path).lower())
        if kind is None:
            known = ", ".join(KINDS)
            raise UserError(path, "its kind is not known", f"Give a file of {known}, or a DICOM series folder.")
        if kind == "nifti":
            values, affine, header, warnings = read_nifti(path, channels)
            return values, affine, header, kind, warnings
        if kind == "dicom":
            values, affine, warnings = read_dicom(path, channels, series)
        else:
            values, affine, warnings = read_itk(path, channels)
        shape = values.shape[1:3] if kind in ("png", "tiff") else values.shape[1:]
        return values, affine, header_for(affine, shape), kind, warnings
    except OSError as error:
        raise UserError(path, f"it cannot be read ({error.strerror})", "Check its permissions and the disk.") from error
    except MemoryError as error:
        raise UserError(
            path, "it needs more memory than there is", "Crop the scan, or use a larger machine."
        ) from error


def _finite_float32(path: Path, values: np.ndarray, warnings: list[str]) -> Float32[np.ndarray, "channels x y z"]:
    """NaN, mostly a mark for outside the field of view, becomes the lowest finite value, infinity the nearest one."""
    if values.dtype.kind == "f":
        finite = np.isfinite(values)
        bad = values.size - int(np.count_nonzero(finite))
        if bad == values.size:
            raise UserError(path, "every voxel is NaN or infinite", "Export the scan again.")
        if bad:
            low, high = values.min(where=finite, initial=np.inf), values.max(where=finite, initial=-np.inf)
            values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
            warnings.append(f"{bad} voxels were NaN or infinite; they were set to the lowest or highest finite value")
    if max(-float(values.min()), float(values.max())) > LARGEST_VALUE:
        scale = max(1.0, float(np.percentile(np.abs(values.astype(np.float64)), 99)) / LARGEST_VALUE)
        values = np.clip(values / scale, -LARGEST_VALUE, LARGEST_VALUE)
        warnings.append(f"the values are huge: they were divided by {scale:.3g} and limited to {LARGEST_VALUE:g}")
    return np.ascontiguousarray(values, np.float32)
