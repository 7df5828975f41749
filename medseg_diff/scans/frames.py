"""What DICOM headers say of every frame: its series, its grid and its place. One frame a file, or many.

Only the elements named in TAGS are ever read from a header, so nothing about the patient can reach a message or a file.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.filereader import read_file_meta_info
from pydicom.pixels import get_decoder
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    RTDoseStorage,
    SegmentationStorage,
)

from medseg_diff.errors import UserError

TAGS = [
    *("SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "Rows", "Columns", "BitsAllocated"),
    *("PhotometricInterpretation", "NumberOfFrames", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "SliceThickness"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
]
EXPORT = "Export the whole series again."
CONVERT = "Convert the series to NIfTI, for example with dcm2niix."


@dataclass(frozen=True)
class Frame:
    """A slice: the `index`-th image of a file, and what its header says."""

    path: Path
    index: int
    series: str
    number: str
    description: str
    rows: int
    columns: int
    spacing_mm: np.ndarray
    orientation: np.ndarray
    position_mm: np.ndarray
    thickness_mm: float
    slope: float
    intercept: float

    @property
    def name(self) -> str:
        """As messages call it."""
        return self.path.name if self.index == 0 else f"{self.path.name} (frame {self.index + 1})"


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


@muted()
def frames_of(where: Path, path: Path) -> list[Frame]:
    """The frames of a file, the length of its pixel data checked; none of a DICOM object that is no image.

    Raises UserError, which calls the file `where`.
    """
    try:
        meta = read_file_meta_info(path)
        with path.open("rb") as file:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=TAGS)
            kind, syntax = meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID
            if kind in (SegmentationStorage, RTDoseStorage) or (
                "Rows" not in header and "Image Storage" not in kind.name
            ):
                return []
            _check_kind(where, header, syntax)
            _check_pixels(where, header, syntax, file, path.stat().st_size)
        frames = [_frame(path, index, header, levels) for index, levels in enumerate(_levels(header))]
        if any(frame.slope == 0 for frame in frames):
            raise UserError(where, "its RescaleSlope is 0, so every slice value is the same", EXPORT)
        return frames
    except (UserError, OSError):
        raise
    except Exception as error:  # of many kinds, and quoting values too
        raise UserError(where, "its DICOM header is damaged or lacks the slice's geometry", EXPORT) from error


@muted()
def series_of(path: Path) -> str | None:
    """The UID of a file's series; None where not even that can be read."""
    try:
        return str(
            pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["SeriesInstanceUID"])[0x0020000E].value
        )
    except Exception:  # of many kinds
        return None


def _check_kind(where: Path, header: Dataset, syntax: UID) -> None:
    if not _decodable(syntax):
        raise UserError(where, f"its transfer syntax {syntax} cannot be decoded", CONVERT)
    if not header.PhotometricInterpretation.startswith("MONO"):
        raise UserError(where, "it holds colours, not gray values", CONVERT)
    if int(header.get("NumberOfFrames") or 1) != len(_levels(header)):
        raise UserError(where, "it holds several frames without a place of their own", CONVERT)
    if "ModalityLUTSequence" in header:
        raise UserError(where, "its values stand in a lookup table", CONVERT)


def _decodable(syntax: UID) -> bool:
    """Deflated files are not, as their header could inflate without a bound."""
    try:
        return syntax != DeflatedExplicitVRLittleEndian and get_decoder(syntax).is_available
    except NotImplementedError:
        return False


def _check_pixels(where: Path, header: Dataset, syntax: UID, file: BinaryIO, size: int) -> None:
    """`file` stands where the pixel data should begin."""
    count = int(header.get("NumberOfFrames") or 1)
    promised = int(header.Rows) * int(header.Columns) * int(header.BitsAllocated) // 8 * count
    element, implicit = file.read(12), syntax == ImplicitVRLittleEndian
    order: Literal["little", "big"] = "big" if syntax == ExplicitVRBigEndian else "little"
    tag = [int.from_bytes(element[i : i + 2], order) for i in (0, 2)]
    length = int.from_bytes(element[4:8] if implicit else element[8:12], order)
    left = size - file.tell() + (4 if implicit else 0)
    if tag != [0x7FE0, 0x10] or left <= 0:
        raise UserError(where, "it has no pixel data", EXPORT)
    if not syntax.is_compressed and not (length == promised + promised % 2 and length <= left):
        what = f"its slice holds {min(length, left)} bytes of pixels, Rows x Columns promise {promised}"
        raise UserError(where, what, EXPORT)


def _levels(header: Dataset) -> list[list[Dataset]]:
    """Where the attributes of each frame may stand, the frame's own first. DICOM PS3.3 C.7.6.16."""
    shared = [macro for group in header.get("SharedFunctionalGroupsSequence", []) for macro in _macros(group)]
    return [[*_macros(own), *shared, header] for own in header.get("PerFrameFunctionalGroupsSequence", [Dataset()])]


def _macros(group: Dataset) -> list[Dataset]:
    return [element.value[0] for element in group if element.VR == "SQ" and element.value]


def _frame(path: Path, index: int, header: Dataset, levels: list[Dataset]) -> Frame:
    def value(name: str, default: Any = None) -> Any:
        return next((level[name].value for level in levels if name in level), default)

    description = str(header.get("SeriesDescription") or "")
    frame = Frame(
        path,
        index,
        str(header.SeriesInstanceUID),
        str(int(header.get("SeriesNumber") or 0) or ""),
        "".join(c for c in description if c.isprintable())[:64],
        int(header.Rows),
        int(header.Columns),
        np.array(value("PixelSpacing"), float).reshape(2),
        np.array(value("ImageOrientationPatient"), float).reshape(2, 3),
        np.array(value("ImagePositionPatient"), float).reshape(3),
        float(value("SliceThickness") or 1),
        float(value("RescaleSlope", 1)),
        float(value("RescaleIntercept", 0)),
    )
    turned = abs(frame.orientation @ frame.orientation.T - np.eye(2)).max() < 1e-2
    if not (turned and frame.spacing_mm.min() > 0 and np.isfinite(frame.position_mm).all()):
        raise ValueError("impossible geometry")
    return frame
