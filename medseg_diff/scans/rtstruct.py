"""RT structure sets: the outlines of a segmentation, as radiotherapy planning reads them. DICOM PS3.3 A.19."""

from pathlib import Path

import numpy as np
import pydicom
from jaxtyping import Integer
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid
from skimage.measure import find_contours

from medseg_diff import __version__
from medseg_diff.files import replacing
from medseg_diff.scans.dicom_seg import PATIENT_AND_STUDY, source_of
from medseg_diff.scans.frames import muted
from medseg_diff.scans.itk import LPS_TO_RAS
from medseg_diff.scans.read import Scan
from medseg_diff.scans.write import label_colors


@muted()
def write_rtstruct(label_map: Integer[np.ndarray, "x y z"], scan: Scan, names: dict[int, str], path: Path) -> None:
    """Writes the contours of every label found, slice by slice; a hole is a contour inside a contour.

    It carries the patient and study of the series, as an archive needs.
    UserError where the scan is not DICOM or nothing was segmented.
    """
    values = sorted(value for value in names if value and (label_map == value).any())
    frames, headers = source_of(scan, "rtstruct", values)
    images = [_reference(headers[frame.path], frame.index) for frame in frames]
    first = headers[frames[0].path]
    series_uid = first.SeriesInstanceUID
    frame_uid = first.get("FrameOfReferenceUID") or generate_uid()
    structures = Dataset()
    for tag in PATIENT_AND_STUDY:
        setattr(structures, tag, getattr(first, tag))
    structures.StudyInstanceUID = first.StudyInstanceUID
    structures.SOPClassUID, structures.SOPInstanceUID = RTStructureSetStorage, generate_uid()
    structures.SeriesInstanceUID, structures.SeriesNumber, structures.Modality = generate_uid(), 301, "RTSTRUCT"
    structures.Manufacturer = structures.ManufacturerModelName = "medseg-diff"
    structures.SoftwareVersions, structures.OperatorsName = __version__, ""
    structures.StructureSetLabel = "medseg-diff"
    structures.StructureSetDate = structures.StructureSetTime = ""
    structures.FrameOfReferenceUID, structures.PositionReferenceIndicator = frame_uid, ""
    study = _item(
        ReferencedSOPClassUID="1.2.840.10008.3.1.2.3.1",  # Detached Study Management, as the standard still asks
        ReferencedSOPInstanceUID=first.StudyInstanceUID,
        RTReferencedSeriesSequence=[_item(SeriesInstanceUID=series_uid, ContourImageSequence=images)],
    )
    structures.ReferencedFrameOfReferenceSequence = [
        _item(FrameOfReferenceUID=frame_uid, RTReferencedStudySequence=[study])
    ]
    numbered = list(enumerate(values, 1))
    structures.StructureSetROISequence = [
        _item(
            ROINumber=number,
            ReferencedFrameOfReferenceUID=frame_uid,
            ROIName=" ".join(names[value].split())[:64],
            ROIGenerationAlgorithm="AUTOMATIC",
        )
        for number, value in numbered
    ]
    structures.ROIContourSequence = [
        _item(
            ReferencedROINumber=number,
            ROIDisplayColor=[int(label_colors(names)[value][k : k + 2], 16) for k in (1, 3, 5)],
            ContourSequence=_contours(label_map == value, LPS_TO_RAS @ scan.affine, images),
        )
        for number, value in numbered
    ]
    structures.RTROIObservationsSequence = [
        _item(ObservationNumber=number, ReferencedROINumber=number, RTROIInterpretedType="", ROIInterpreter="")
        for number, _ in numbered
    ]
    structures.ApprovalStatus = "UNAPPROVED"
    structures.file_meta = FileMetaDataset()
    structures.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    with replacing(path) as temporary:
        pydicom.dcmwrite(temporary, structures, enforce_file_format=True)


def _contours(mask: np.ndarray, lps: np.ndarray, images: list[Dataset]) -> list[Dataset]:
    contours = []
    for z in np.flatnonzero(mask.any((0, 1))):
        for outline in find_contours(np.pad(mask[:, :, z], 1).astype(float), 0.5):
            x, y = outline[:-1].T - 1  # of the padding; the last point repeats the first
            points = (lps @ np.array([x, y, np.full_like(x, z), np.ones_like(x)]))[:3].T
            contours.append(
                _item(
                    ContourImageSequence=[images[z]],
                    ContourGeometricType="CLOSED_PLANAR",
                    NumberOfContourPoints=len(points),
                    ContourData=[f"{v:.4f}" for v in points.ravel()],
                )
            )
    return contours


def _reference(header: Dataset, index: int) -> Dataset:
    """To a file of one slice, or to a frame of one of many."""
    item = _item(ReferencedSOPClassUID=header.SOPClassUID, ReferencedSOPInstanceUID=header.SOPInstanceUID)
    if "NumberOfFrames" in header:
        item.ReferencedFrameNumber = index + 1
    return item


def _item(**elements: object) -> Dataset:
    item = Dataset()
    for name, value in elements.items():
        setattr(item, name, value)
    return item
