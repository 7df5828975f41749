"""Synthetic DICOM series for the tests: oblique, marked voxel by voxel, any element changed or left out."""

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

ROWS, COLUMNS, SLICES = 5, 4, 6
VALUES = np.arange(COLUMNS * ROWS * SLICES, dtype=np.int16).reshape(COLUMNS, ROWS, SLICES)
TURN = np.linalg.qr(np.array([[3.0, 1, 0.5], [-1, 2, 0.3], [0.2, -0.4, 4]]))[0]
TURN *= np.sign(np.linalg.det(TURN))  # right-handed, as every stack of slices is
SERIES, STUDY, FRAME = generate_uid(), generate_uid(), generate_uid()


def slice_at(z: float, values: np.ndarray = VALUES[:, :, 0], **changes: object) -> FileDataset:
    """One oblique MR slice of 1.1 x 0.7 mm pixels at `z` mm along the normal; a change to None removes the element."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = MRImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    image = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    image.SOPClassUID, image.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
    image.SeriesInstanceUID, image.StudyInstanceUID, image.FrameOfReferenceUID = SERIES, STUDY, FRAME
    image.PatientName, image.PatientID, image.Modality = "Doe^Jane", "4711", "MR"
    image.Rows, image.Columns, image.PixelSpacing = ROWS, COLUMNS, [1.1, 0.7]
    image.ImageOrientationPatient = [round(float(v), 10) for v in (*TURN[:, 0], *TURN[:, 1])]
    image.ImagePositionPatient = [round(float(v), 6) for v in TURN @ [3, -20, z]]
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 1
    image.PixelData = values.T.astype("<i2").tobytes()
    for name, value in changes.items():
        if value is None:
            delattr(image, name)
        else:
            setattr(image, name, value)
    return image


def make_series(folder: Path, places=range(SLICES), step: float = 2.5, **changes: object) -> Path:
    """A folder of slices at places * step, named so that the order of names is not the order of slices."""
    folder.mkdir(exist_ok=True)
    for i in places:
        slice_at(i * step, VALUES[:, :, i % SLICES], **changes).save_as(folder / f"{(i * 7) % 11}.dcm")
    return folder


def enhanced(path: Path, order=range(SLICES), step: float = 2.5, **changes: object) -> Path:
    """One file of all the slices, in any order of frames, each with its own slope."""
    image = slice_at(0, VALUES[:, :, [*order]].transpose(2, 1, 0).reshape(-1, COLUMNS).T, **changes)
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
    image.NumberOfFrames = str(len(order))
    shared, image.PerFrameFunctionalGroupsSequence = Dataset(), []
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [Dataset()], [Dataset()]
    shared.PixelMeasuresSequence[0].PixelSpacing = image.PixelSpacing
    shared.PixelMeasuresSequence[0].SliceThickness = step
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = image.ImageOrientationPatient
    image.SharedFunctionalGroupsSequence = [shared]
    for z in order:
        frame = Dataset()
        frame.PlanePositionSequence, frame.PixelValueTransformationSequence = [Dataset()], [Dataset()]
        frame.PlanePositionSequence[0].ImagePositionPatient = slice_at(z * step).ImagePositionPatient
        frame.PixelValueTransformationSequence[0].RescaleSlope = str(1 + z)
        frame.PixelValueTransformationSequence[0].RescaleIntercept = "-3"
        image.PerFrameFunctionalGroupsSequence.append(frame)
    for name in ("PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient"):
        delattr(image, name)
    image.save_as(path)
    return path
