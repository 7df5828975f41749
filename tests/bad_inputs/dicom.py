"""66-74: series of DICOM slices that are incomplete, mixed or hostile, and what is no file at all."""

import gzip
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from dicom_series import SLICES, TURN, VALUES, make_series, slice_at
from pydicom.uid import generate_uid

from bad_inputs.case import Case, Maker, Volume, call, files, refused, segment
from bad_inputs.nifti import nifti

UNKNOWN_SYNTAX = "1.2.840.10008.1.2.4.201"
HOSTILE = "../../x\n\x1b[31m" + "y" * 65_000


def _series(change: Callable[[Path], object] = lambda folder: None, **options: object) -> Maker:
    """A series in a folder, and then a change of the folder."""

    def make(folder: Path) -> Path:
        with warnings.catch_warnings(action="ignore"):
            series = make_series(folder / "series", **options)
        change(series)
        return series

    return make


def _odd(**changes: object) -> Maker:
    """A series with one more slice, which does not fit."""
    return _series(lambda folder: slice_at(SLICES * 2.5, **changes).save_as(folder / "odd.dcm"))


def _undecodable(folder: Path) -> None:
    odd = slice_at(SLICES * 2.5, PixelData=pydicom.encaps.encapsulate([b"not decoded"]))
    odd["PixelData"].is_undefined_length = True
    odd.file_meta.TransferSyntaxUID = UNKNOWN_SYNTAX
    odd.save_as(folder / "odd.dcm")


def _cut(folder: Path) -> None:
    path = folder / "7.dcm"
    path.write_bytes(path.read_bytes()[:-9])


def _link(folder: Path) -> None:
    slice_at(SLICES * 2.5).save_as(folder.parent / "outside.dcm")
    (folder / "link.dcm").symlink_to(folder.parent / "outside.dcm")


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "a.nii.gz")
    return folder / "a.nii.gz"


def _folder(folder: Path) -> Path:
    path = folder / "a.nii.gz"
    path.mkdir()
    (path / "voxels").write_bytes(nifti())
    return path


def _check_hostile(folder: Path) -> None:
    """Its name is in no message, in no name of a file and in no file but those of DICOM."""
    series = HOSTILE_SERIES(folder)
    before = files(folder)
    code, out, err = call(*segment(series), "--save", "seg,uncertainty,prob,preview,report,seg-nrrd,dicom-seg,rtstruct")
    assert code == 0, (out, err)
    written = files(folder) - before - {folder / "tiny.safetensors"}
    assert {path.parent for path in written} == {folder / "out"}
    assert len(written) >= 8
    told = [out.encode(), err.encode(), *(path.read_bytes() for path in written if path.suffix != ".dcm")]
    for content in told:
        plain = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
        for trace in (b"yyyy", b"\x1b", b"4711") if plain in told[:2] else (b"yyyyyyyy", b"\x1b[31m", b"Doe\n4711"):
            assert trace not in plain


HOSTILE_SERIES = _series(PatientName=HOSTILE, PatientID="Doe\n4711")
PLACE = nib.affines.from_matvec(TURN @ np.diag([0.7, 1.1, 2.5]), TURN @ [3, -20, 0])
SEEN = Volume(VALUES.astype(np.float32), np.diag([-1, -1, 1, 1]) @ PLACE)

CASES = [
    refused(
        66,
        "a missing slice",
        _series(places=[0, 1, 3, 4, 5]),
        "a slice is missing.* 5 mm apart, most slices 2.5 mm",
        must="refuse, name the gap",
    ),
    refused(
        67,
        "a slice twice",
        _series(lambda folder: shutil.copy(folder / "7.dcm", folder / "copy.dcm")),
        "same place",
    ),
    refused(68, "two series in a folder", _odd(SeriesInstanceUID=generate_uid()), "2 series", must="refuse, list them"),
    refused(69, "mixed PixelSpacing", _odd(PixelSpacing=[1.1, 0.8]), "odd.dcm: .*differs"),
    refused(69, "mixed orientation", _odd(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]), "odd.dcm: .*differs"),
    refused(
        70, "a transfer syntax without a decoder", _series(_undecodable), UNKNOWN_SYNTAX, must="refuse, name the UID"
    ),
    refused(71, "a slice without pixels", _odd(PixelData=None), "odd.dcm: .*no pixel data"),
    refused(71, "pixels cut short", _series(_cut), "7.dcm: .*31 bytes of pixels"),
    refused(71, "Rows x Columns lie", _odd(Rows=60000, Columns=60000), "odd.dcm: .*promise 7200000000"),
    refused(72, "RescaleSlope 0", _odd(RescaleSlope="0", RescaleIntercept="5"), "odd.dcm: .*RescaleSlope is 0"),
    Case(
        73,
        "a patient's name of `../../x`, a line break, an escape and 64 KB",
        "in no path, message, output or record but DICOM's own",
        _check_hostile,
        HOSTILE_SERIES,
        SEEN,
    ),
    refused(74, "a link out of the folder", _series(_link), "link.dcm: .*no regular file of this folder"),
    refused(74, "a FIFO", _fifo, "neither a file", must="refuse without hanging"),
    refused(74, "a FIFO among the slices", _series(lambda folder: os.mkfifo(folder / "fifo.dcm")), "no regular file"),
    refused(74, "a folder named `.nii.gz`", _folder, "no DICOM image"),
]
