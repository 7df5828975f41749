"""What is written for a DICOM series, read again by highdicom, pydicom and SimpleITK: the same voxels in a patient."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_series import COLUMNS, ROWS, SLICES, TURN, enhanced, make_series, slice_at
from scipy.spatial import KDTree

from medseg_diff.errors import UserError
from medseg_diff.scans.dicom_seg import PATIENT_AND_STUDY, write_dicom_seg
from medseg_diff.scans.read import Scan, read_scan
from medseg_diff.scans.rtstruct import write_rtstruct

NAMES = {0: "background", 1: "Head", 5: "absent", 7: "Tail"}
LIVER = ("123037004 |Anatomical Structure|", "10200004 |Liver|")
Places = dict[int, set[tuple[float, ...]]]


def labelled(scan: Scan) -> np.ndarray:
    """Two labels without any symmetry, the first and the last slice free of the one or the other."""
    labels = np.zeros(scan.shape, np.uint8)
    x, y, z = (n // 2 for n in scan.shape)
    labels[:x, 1 : y + 1, :z] = 1
    labels[x:, y:, z - 1 :] = 7
    labels[-1, -1, -1] = 0
    return labels


def world(positions: np.ndarray) -> set[tuple[float, ...]]:
    return set(map(tuple, (np.round(positions, 2) + 0.0).tolist()))


def places_of(labels: np.ndarray, scan: Scan) -> Places:
    """Where the labels lie in the patient, in LPS, by the affine of the scan."""
    lps = np.diag([-1, -1, 1, 1]) @ scan.affine
    return {v: world(np.argwhere(labels == v) @ lps[:3, :3].T + lps[:3, 3]) for v in np.unique(labels) if v}


def by_highdicom(path: Path) -> Places:
    import highdicom as hd

    volume = hd.seg.segread(path).get_volume(combine_segments=True)
    return {
        value: world(volume.map_indices_to_reference(np.argwhere(volume.array == number)))
        for number, value in ((1, 1), (2, 7))
    }


def frames(segmentation: pydicom.Dataset) -> Iterator[tuple[int, np.ndarray, pydicom.Dataset]]:
    for pixels, groups in zip(segmentation.pixel_array, segmentation.PerFrameFunctionalGroupsSequence, strict=True):
        yield groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber, pixels, groups


def by_pydicom(path: Path) -> Places:
    segmentation, found = pydicom.dcmread(path), {1: set(), 7: set()}
    shared = segmentation.SharedFunctionalGroupsSequence[0]
    row, column = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float).reshape(2, 3)
    down, right = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    for number, pixels, groups in frames(segmentation):
        corner = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float)
        steps = np.argwhere(pixels) @ np.array([column * down, row * right])
        found[{1: 1, 2: 7}[number]] |= world(corner + steps)
    return found


def assert_equal(found: Places, expected: Places) -> None:
    assert found.keys() == expected.keys()
    for value, places in expected.items():
        a, b = (np.array([*some]) for some in (found[value], places))
        assert a.shape == b.shape
        nearest, partners = KDTree(a).query(b)
        assert nearest.max() < 0.02
        assert len(set(partners)) == len(a)


@pytest.mark.parametrize("make", ["slices", "frames", "real 0", "real 1"])
def test_a_segmentation_lies_where_the_scan_lies(tmp_path, make, request):
    if make.startswith("real"):
        source = sorted(request.getfixturevalue("dicom").iterdir())[int(make[-1])]
    else:
        source = make_series(tmp_path / "a") if make == "slices" else enhanced(tmp_path / "a.dcm", [3, 0, 5, 1, 4, 2])
    scan = read_scan(source)
    labels, path = labelled(scan), tmp_path / "seg.dcm"
    write_dicom_seg(labels, scan, NAMES, path, {7: LIVER})
    expected = places_of(labels, scan)
    assert_equal(by_highdicom(path), expected)
    assert_equal(by_pydicom(path), expected)
    segmentation = pydicom.dcmread(path)
    assert segmentation.SegmentationType == "BINARY"
    bits = segmentation.pixel_array.ravel() > 0
    whole = len(bits) // 8 * 8  # GDCM drops the last byte that is not full
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(path)).ravel()[:whole] > 0, bits[:whole])
    head, tail = segmentation.SegmentSequence
    assert (head.SegmentLabel, tail.SegmentLabel) == ("Head", "Tail")
    assert head.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Tissue"
    category, kind = tail.SegmentedPropertyCategoryCodeSequence[0], tail.SegmentedPropertyTypeCodeSequence[0]
    assert (category.CodeValue, category.CodingSchemeDesignator) == ("123037004", "SCT")
    assert (kind.CodeValue, kind.CodeMeaning) == ("10200004", "Liver")


@pytest.mark.parametrize("kind", ["slices", "frames"])
def test_every_frame_refers_to_the_slice_below_it(tmp_path, kind):
    source = make_series(tmp_path / "a") if kind == "slices" else enhanced(tmp_path / "a.dcm", [3, 0, 5, 1, 4, 2])
    files = [pydicom.dcmread(path) for path in (source.iterdir() if kind == "slices" else [source])]
    scan = read_scan(source)
    write_dicom_seg(labelled(scan), scan, NAMES, tmp_path / "seg.dcm")
    write_rtstruct(labelled(scan), scan, NAMES, tmp_path / "rt.dcm")

    def place(reference: pydicom.Dataset) -> np.ndarray:
        (file,) = (f for f in files if f.SOPInstanceUID == reference.ReferencedSOPInstanceUID)
        if kind == "slices":
            return np.array(file.ImagePositionPatient, float)
        groups = file.PerFrameFunctionalGroupsSequence[reference.ReferencedFrameNumber - 1]
        return np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float)

    for _, _, groups in frames(pydicom.dcmread(tmp_path / "seg.dcm")):
        (reference,) = groups.DerivationImageSequence[0].SourceImageSequence
        position = groups.PlanePositionSequence[0].ImagePositionPatient
        np.testing.assert_allclose(place(reference), np.array(position, float), atol=1e-3)
    contours = [c for roi in pydicom.dcmread(tmp_path / "rt.dcm").ROIContourSequence for c in roi.ContourSequence]
    for contour in contours:
        points = np.array(contour.ContourData, float).reshape(-1, 3)
        offset = (points - place(contour.ContourImageSequence[0])) @ TURN[:, 2]
        np.testing.assert_allclose(offset, 0, atol=1e-3)


def test_an_oblique_series_gets_contours_at_their_place(tmp_path):
    scan = read_scan(make_series(tmp_path / "series"))
    labels = np.zeros(scan.shape, np.uint8)
    labels[1, 2, 3] = 7
    write_rtstruct(labels, scan, NAMES, tmp_path / "rt.dcm")
    structures = pydicom.dcmread(tmp_path / "rt.dcm")
    (contour,) = structures.ROIContourSequence[0].ContourSequence
    points = np.array(contour.ContourData, float).reshape(-1, 3)
    ((expected,),) = ([*places] for places in places_of(labels, scan).values())
    np.testing.assert_allclose(points.mean(0), expected, atol=1e-2)
    np.testing.assert_allclose(np.ptp(points @ TURN, axis=0), [0.7, 1.1, 0], atol=1e-3)
    assert structures.StructureSetROISequence[0].ROIName == "Tail"
    assert structures.PatientID == "4711"


def test_a_ring_has_a_contour_for_its_hole(tmp_path):
    folder = tmp_path / "series"
    folder.mkdir()
    slice_at(0, np.zeros((9, 9), np.int16), Rows=9, Columns=9).save_as(folder / "a.dcm")
    labels = np.zeros((9, 9, 1), np.uint8)
    labels[2:7, 2:7] = 1
    labels[4, 4] = 0
    write_rtstruct(labels, read_scan(folder), {1: "Ring"}, tmp_path / "rt.dcm")
    contours = pydicom.dcmread(tmp_path / "rt.dcm").ROIContourSequence[0].ContourSequence
    sizes = sorted(np.ptp(np.array(c.ContourData, float).reshape(-1, 3) @ TURN, axis=0)[0] / 0.7 for c in contours)
    np.testing.assert_allclose(sizes, [1, 5], atol=1e-3)


def test_a_de_identified_series_gets_both(tmp_path):
    """Without any of the elements that may be empty."""
    absent = dict.fromkeys(tag for tag in PATIENT_AND_STUDY if tag in slice_at(0))
    assert absent
    scan = read_scan(make_series(tmp_path / "series", **absent))
    write_dicom_seg(labelled(scan), scan, NAMES, tmp_path / "seg.dcm")
    write_rtstruct(labelled(scan), scan, NAMES, tmp_path / "rt.dcm")
    assert_equal(by_pydicom(tmp_path / "seg.dcm"), places_of(labelled(scan), scan))
    for name in ("seg.dcm", "rt.dcm"):
        written = pydicom.dcmread(tmp_path / name)
        assert {str(written[tag].value or "") for tag in PATIENT_AND_STUDY} == {""}


def test_the_series_that_was_chosen_is_the_one_referred_to(tmp_path):
    folder = make_series(tmp_path / "two", SeriesNumber=3)
    for z in range(2):
        slice_at(z, SeriesInstanceUID="1.2.3", SeriesNumber=4).save_as(folder / f"other{z}.dcm")
    scan = read_scan(folder, series="4")
    write_dicom_seg(np.ones(scan.shape, np.uint8), scan, NAMES, tmp_path / "seg.dcm")
    assert pydicom.dcmread(tmp_path / "seg.dcm").ReferencedSeriesSequence[0].SeriesInstanceUID == "1.2.3"


def test_what_cannot_carry_a_segmentation_is_refused(tmp_path):
    scan = read_scan(make_series(tmp_path / "series", FrameOfReferenceUID=None))
    labels = np.ones((COLUMNS, ROWS, SLICES), np.uint8)
    with pytest.raises(UserError, match="lack what a DICOM segmentation needs"):
        write_dicom_seg(labels, scan, NAMES, tmp_path / "seg.dcm")
    with pytest.raises(UserError, match="nothing was segmented for rtstruct"):
        write_rtstruct(labels * 0, scan, NAMES, tmp_path / "rt.dcm")
    picture = tmp_path / "a.png"
    sitk.WriteImage(sitk.GetImageFromArray(np.eye(4, dtype=np.uint8)), picture)
    with pytest.raises(UserError, match="needs a DICOM series"):
        write_dicom_seg(np.ones((4, 4, 1), np.uint8), read_scan(picture), NAMES, tmp_path / "seg.dcm")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "series"]
