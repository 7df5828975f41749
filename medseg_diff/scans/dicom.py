"""DICOM series: every slice's header is checked, because a series with a missing slice reads silently, stretched.

Only the elements named in TAGS are ever read from a header, so nothing about the patient can reach a message or a file.
"""

import statistics
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.filereader import read_file_meta_info

from medseg_diff.errors import UserError
from medseg_diff.scans.geometry import VOXEL_LIMIT, check_geometry
from medseg_diff.scans.itk import LPS_TO_RAS

TAGS = [
    *("SeriesInstanceUID", "ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "SliceThickness"),
    *("Rows", "Columns", "BitsAllocated", "PhotometricInterpretation", "NumberOfFrames", "RescaleSlope"),
]
IMPLICIT, EXPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
COMPRESSED = ["1.2.840.10008.1.2.5", *(f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 57, 70, 80, 81, 90, 91))]
UNZIPPED_LIMIT = 4 * VOXEL_LIMIT
EXPORT = "Export the whole series again."
CONVERT = "Convert the series to NIfTI, for example with dcm2niix."


@dataclass(frozen=True)
class Slice:
    """What the header of one slice says of its series, its grid and its place."""

    path: Path
    series: str
    rows: int
    columns: int
    spacing_mm: np.ndarray
    orientation: np.ndarray
    position_mm: np.ndarray
    thickness_mm: float


@contextmanager
def muted() -> Iterator[None]:
    """Keeps the warnings of pydicom and highdicom unheard: they quote what they dislike, such as a patient's name."""
    with warnings.catch_warnings(action="ignore"):
        yield


def is_dicom(path: Path) -> bool:
    """Whether a regular file carries the DICOM mark."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_dicom(path: Path, channels: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Values "1 x y z" as rescaled float32, RAS affine in mm, warnings; from a folder or a zip of one series."""
    if channels != 1:
        raise UserError(
            path, f"a DICOM series holds one channel, the model needs {channels}", "Give a NIfTI of them all."
        )
    with dicom_folder(path) as folder:
        slices, notes = read_slices(path, folder)
        affine = _affine(path, slices)
        shape = slices[0].columns, slices[0].rows, len(slices)
        notes += check_geometry(path, affine, shape)
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames([str(s.path) for s in slices])
        reader.SetOutputPixelType(sitk.sitkFloat32)  # the type of the first slice could not hold the values of others
        sitk.ProcessObject.SetGlobalWarningDisplay(False)
        try:
            values = sitk.GetArrayFromImage(reader.Execute())
        except RuntimeError as error:
            raise UserError(path, "the pixels of its slices cannot be decoded", EXPORT) from error
        finally:
            sitk.ProcessObject.SetGlobalWarningDisplay(True)
    return values.reshape(1, *reversed(shape)).transpose(0, 3, 2, 1), affine, notes


@contextmanager
def dicom_folder(path: Path) -> Iterator[Path]:
    """The folder itself, or a temporary one with what a zip holds; UserError for a zip that reaches out or explodes."""
    if path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                _check_members(path, archive.infolist())
                archive.extractall(folder)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise UserError(path, "the zip is damaged or of an unusual kind", "Zip the series again.") from error
        yield Path(folder)


def _check_members(path: Path, members: list[zipfile.ZipInfo]) -> None:
    for member in members:
        name = PurePosixPath(member.filename.replace("\\", "/"))
        link = (member.external_attr >> 16) & 0o170000 == 0o120000
        outside = not name.parts or name.is_absolute() or ".." in name.parts or ":" in name.parts[0]
        if outside or link or member.flag_bits & 1:
            what = f"its member {member.filename!r} is encrypted, a link, nameless, or would be written outside"
            raise UserError(path, what, "Zip the plain folder of the series again.")
    size = sum(member.file_size for member in members)
    if size > UNZIPPED_LIMIT:
        raise UserError(path, f"it would unzip to {size} bytes; {UNZIPPED_LIMIT} are read", "Give the folder instead.")


def read_slices(path: Path, folder: Path) -> tuple[list[Slice], list[str]]:
    """The slices of the one series in `folder`, along its normal, and warnings; messages call the folder `path`."""
    slices, ignored = [], 0
    for file in sorted(folder.rglob("*")):
        where = path / file.relative_to(folder)
        if file.is_dir() or file.name.startswith("."):
            continue
        if not file.is_file() or (file.is_symlink() and folder.resolve() not in file.resolve().parents):
            raise UserError(
                where, "it is no regular file of this folder", "Remove it, or copy the series without links."
            )
        image = _read_slice(where, file) if is_dicom(file) or file.suffix.lower() == ".dcm" else None
        ignored += image is None
        slices += [image] if image else []
    if not slices:
        raise UserError(path, "it holds no DICOM image", "Give the folder of a DICOM series, or a scan file.")
    series = [[s for s in slices if s.series == uid] for uid in dict.fromkeys(s.series for s in slices)]
    if len(series) > 1:
        listed = "; ".join(f"{len(s)} slices, the first in {s[0].path.relative_to(folder)}" for s in series)
        raise UserError(path, f"it holds {len(series)} series: {listed}", "Give each series a folder of its own.")
    first = slices[0]
    for other in slices:
        same = (other.rows, other.columns) == (first.rows, first.columns)
        same = same and np.allclose(other.spacing_mm, first.spacing_mm, rtol=1e-3)
        if not same or not np.allclose(other.orientation, first.orientation, atol=1e-3):
            what = f"its size, spacing or orientation differs from that of {first.path.name}"
            raise UserError(path / other.path.relative_to(folder), what, "Give only slices of one volume.")
    slices.sort(key=lambda s: s.position_mm @ np.cross(*first.orientation))
    return slices, [f"{ignored} files that are no DICOM images were ignored"] if ignored else []


@muted()
def _read_slice(where: Path, path: Path) -> Slice | None:
    """The header of one slice, its pixel data's length checked; None for DICOM objects that are no images."""
    try:
        with path.open("rb") as file:
            meta = read_file_meta_info(path)
            syntax = str(meta.TransferSyntaxUID)
            if syntax not in (IMPLICIT, EXPLICIT, BIG_ENDIAN, *COMPRESSED):
                raise UserError(where, f"its transfer syntax {syntax} cannot be decoded", CONVERT)
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=TAGS)
            if "Rows" not in header and "Image Storage" not in meta.MediaStorageSOPClassUID.name:
                return None
            if int(header.get("NumberOfFrames") or 1) > 1 or not header.PhotometricInterpretation.startswith("MONO"):
                raise UserError(where, "it holds several frames or colours, not one gray slice", CONVERT)
            if float(header.get("RescaleSlope", 1)) == 0:
                raise UserError(where, "its RescaleSlope is 0, so every slice value is the same", EXPORT)
            promised = int(header.Rows) * int(header.Columns) * int(header.BitsAllocated) // 8
            element = file.read(12)
            order: Literal["little", "big"] = "big" if syntax == BIG_ENDIAN else "little"
            tag = [int.from_bytes(element[i : i + 2], order) for i in (0, 2)]
            length = int.from_bytes(element[4:8] if syntax == IMPLICIT else element[8:12], order)
            left = path.stat().st_size - file.tell() + (4 if syntax == IMPLICIT else 0)
            if tag != [0x7FE0, 0x10] or left <= 0:
                raise UserError(where, "it has no pixel data", EXPORT)
            if syntax not in COMPRESSED and not (length == promised + promised % 2 and length <= left):
                what = f"its slice holds {min(length, left)} bytes of pixels, Rows x Columns promise {promised}"
                raise UserError(where, what, EXPORT)
            return Slice(
                path,
                str(header.SeriesInstanceUID),
                int(header.Rows),
                int(header.Columns),
                np.array(header.PixelSpacing, float).reshape(2),
                np.array(header.ImageOrientationPatient, float).reshape(2, 3),
                np.array(header.ImagePositionPatient, float).reshape(3),
                float(header.get("SliceThickness") or 1),
            )
    except (UserError, OSError):
        raise
    except Exception as error:  # of many kinds, and quoting values too
        raise UserError(where, "its DICOM header is damaged or lacks the slice's geometry", EXPORT) from error


def _affine(path: Path, slices: list[Slice]) -> np.ndarray:
    """RAS affine of the stack; UserError unless its slices lie evenly along a line. DICOM PS3.3 C.7.6.2.1.1."""
    first, n = slices[0], len(slices)
    rows, columns = first.orientation
    normal = np.cross(rows, columns)
    positions = np.array([s.position_mm for s in slices])
    step = (positions[-1] - positions[0]) / (n - 1) if n > 1 else normal * first.thickness_mm
    gaps = np.diff(positions @ normal)
    if n > 1 and gaps.min() < 1e-3:
        i = int(gaps.argmin())
        what = f"the slices {slices[i].path.name} and {slices[i + 1].path.name} lie at the same place"
        raise UserError(path, what, "Remove the duplicated slice, or split a series of several volumes.")
    if abs(positions - positions[0] - np.outer(np.arange(n), step)).max() > 0.1 * np.linalg.norm(step):
        i, usual = int(gaps.argmax()), statistics.median_low(gaps.tolist())
        what = f"a slice is missing or out of line: {slices[i].path.name} and {slices[i + 1].path.name} lie "
        raise UserError(path, what + f"{gaps[i]:.3g} mm apart, most slices {usual:.3g} mm", EXPORT)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = rows * first.spacing_mm[1], columns * first.spacing_mm[0]
    affine[:3, 2], affine[:3, 3] = step, first.position_mm
    return LPS_TO_RAS @ affine
