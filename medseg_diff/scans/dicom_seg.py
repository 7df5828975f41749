"""DICOM segmentation objects, and what outputs that belong to a DICOM series take from its headers."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pydicom
from jaxtyping import Integer
from pydicom.sr.coding import Code

from medseg_diff import __version__
from medseg_diff.errors import UserError
from medseg_diff.files import replacing
from medseg_diff.scans.archive import unpacked
from medseg_diff.scans.dicom import read_frames
from medseg_diff.scans.frames import Frame, muted
from medseg_diff.scans.itk import LPS_TO_RAS
from medseg_diff.scans.read import Scan
from medseg_diff.scans.write import codes_of, label_colors

PATIENT_AND_STUDY = (  # elements of type 2: present, if only empty; de-identified series lack some
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    *("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"),
)


@muted()
def write_dicom_seg(
    label_map: Integer[np.ndarray, "x y z"],
    scan: Scan,
    names: dict[int, str],
    path: Path,
    codes: Mapping[int, tuple[str, str]] | None = None,
) -> None:
    """Writes a binary DICOM segmentation that belongs to the series the scan was read from.

    It carries the patient and study of that series, as an archive needs; no other output but RTSTRUCT does.
    `codes` as of `codes_of`. UserError where the scan is not DICOM, is sheared, or nothing was segmented.
    """
    values = sorted(value for value in names if value and (label_map == value).any())
    headers = list(source_of(scan, "dicom-seg", values)[1].values())
    import highdicom as hd  # slow, and rarely needed

    algorithm = hd.AlgorithmIdentificationSequence(
        name="medseg-diff", version=__version__, family=Code("123109", "DCM", "Artificial Intelligence")
    )
    descriptions = []
    for number, value in enumerate(values, 1):
        category, kind = (Code(code, "SCT", meaning) for code, meaning in codes_of(value, codes))
        descriptions.append(
            hd.seg.SegmentDescription(
                segment_number=number,
                segment_label=" ".join(names[value].split())[:64],
                segmented_property_category=category,
                segmented_property_type=kind,
                algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=algorithm,
                display_color=hd.color.CIELabColor.from_string(label_colors(names)[value]),
            )
        )
    numbers = np.zeros(label_map.shape, np.uint8 if len(values) < 256 else np.uint16)
    for number, value in enumerate(values, 1):
        numbers[label_map == value] = number
    try:
        # Frames are the slices of the series only if the slice axis comes first, and rows before columns.
        volume = hd.Volume(
            numbers.transpose(2, 1, 0),
            (LPS_TO_RAS @ scan.affine)[:, [2, 1, 0, 3]],
            coordinate_system="PATIENT",
            frame_of_reference_uid=headers[0].FrameOfReferenceUID,
        )
        segmentation = hd.seg.Segmentation(
            headers,
            volume,
            hd.seg.SegmentationTypeValues.BINARY,
            descriptions,
            series_instance_uid=hd.UID(),
            series_number=300,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer="medseg-diff",
            manufacturer_model_name="medseg-diff",
            software_versions=__version__,
            device_serial_number="none",
        )
    except (AttributeError, ValueError, TypeError) as error:
        what = "its headers lack what a DICOM segmentation needs, or its slices are tilted"
        raise UserError(scan.path, what, "Leave dicom-seg out of --save.") from error
    with replacing(path) as temporary:
        segmentation.save_as(temporary)


def source_of(scan: Scan, item: str, values: list[int]) -> tuple[list[Frame], dict[Path, pydicom.Dataset]]:
    """The slices of a DICOM scan, and the headers of their files, absent elements of type 2 set empty.

    UserError if `item` cannot be made of the scan, or without any of the labels `values`.
    """
    if scan.kind != "dicom":
        raise UserError(scan.path, f"{item} needs a DICOM series", f"Leave {item} out of --save.")
    if not values:
        raise UserError(scan.path, f"nothing was segmented for {item}", f"Leave {item} out of --save.")
    with unpacked(scan.path) as folder:
        frames, _ = read_frames(scan.path, folder, scan.series)
        headers: dict[Path, pydicom.Dataset] = {
            frame.path: pydicom.dcmread(frame.path, stop_before_pixels=True) for frame in frames if frame.index == 0
        }
    for header in headers.values():
        for tag in (*PATIENT_AND_STUDY, "SliceThickness"):
            if tag not in header:
                setattr(header, tag, "")
    return frames, headers
