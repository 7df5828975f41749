import os
import shutil
import stat
import warnings
import zipfile
from pathlib import Path

import gdcm
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_series import COLUMNS, ROWS, SLICES, TURN, VALUES, enhanced, make_series, slice_at
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.uid import (
    BasicTextSRStorage,
    DeflatedExplicitVRLittleEndian,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    SegmentationStorage,
    generate_uid,
)

from medseg_diff.errors import UserError
from medseg_diff.scans.dicom_seg import write_dicom_seg
from medseg_diff.scans.find import find_scans
from medseg_diff.scans.frames import is_dicom
from medseg_diff.scans.read import read_scan
from medseg_diff.scans.rtstruct import write_rtstruct


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_scan(path)
    assert path.name in caught.value.where
    assert "Doe" not in str(caught.value)
    assert "4711" not in str(caught.value)
    return caught.value.what


def geometry_of(folder: Path) -> tuple[np.ndarray, sitk.Image]:
    """SimpleITK's own array x y z and image."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0), image


def assert_same_place(folder: Path) -> None:
    scan = read_scan(folder)
    values, image = geometry_of(folder)
    np.testing.assert_array_equal(scan.array[0], values)
    for index in [(0, 0, 0), (1, 2, 3), tuple(n - 1 for n in scan.shape)]:
        ras = np.array(image.TransformIndexToPhysicalPoint(index)) * [-1, -1, 1]
        np.testing.assert_allclose((scan.affine @ [*index, 1])[:3], ras, atol=1e-4)


def test_real_series_lie_where_simpleitk_puts_them(dicom):
    folders = sorted(dicom.iterdir())
    assert len(folders) == 2
    for folder in folders:
        assert_same_place(folder)
        assert read_scan(folder).name == folder.name
        assert read_scan(folder).warnings == ()


def test_an_oblique_series_lies_where_simpleitk_puts_it(tmp_path):
    folder = make_series(tmp_path / "series")
    assert_same_place(folder)
    scan = read_scan(folder)
    np.testing.assert_array_equal(scan.array[0], VALUES)
    np.testing.assert_allclose(scan.spacing_mm, (0.7, 1.1, 2.5), atol=1e-5)
    assert scan.kind == "dicom"


def test_a_zip_reads_as_its_folder(tmp_path):
    folder = make_series(tmp_path / "series")
    shutil.make_archive(str(tmp_path / "knee"), "zip", tmp_path, "series")
    packed, plain = read_scan(tmp_path / "knee.zip"), read_scan(folder)
    assert packed.name == "knee"
    np.testing.assert_array_equal(packed.array, plain.array)
    np.testing.assert_array_equal(packed.affine, plain.affine)


def test_rescaling_of_each_slice_is_applied(tmp_path):
    folder = tmp_path / "pet"
    folder.mkdir()
    for z in range(SLICES):
        slice_at(z, VALUES[:, :, z], RescaleSlope=str(1 + z / 4), RescaleIntercept="-3").save_as(folder / f"{z}.dcm")
    expected = VALUES * (1 + np.arange(SLICES) / 4) - 3
    np.testing.assert_allclose(read_scan(folder).array[0], expected, rtol=1e-6)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEGLosslessSV1])
def test_compressed_slices_are_decoded(tmp_path, syntax):
    values = np.random.default_rng(0).integers(-2000, 2000, (64, 64, 3), dtype=np.int16)
    folder = tmp_path / "packed"
    folder.mkdir()
    for z in range(3):
        path = folder / f"{z}.dcm"
        slice_at(z, values[:, :, z], Rows=64, Columns=64).save_as(path)
        compress(path, syntax)
    np.testing.assert_array_equal(read_scan(folder).array[0], values)


def compress(path: Path, syntax: str) -> None:
    """By GDCM where pydicom has no encoder."""
    if syntax != JPEGLosslessSV1:
        image = pydicom.dcmread(path)
        image.compress(syntax, generate_instance_uid=False)
        image.save_as(path)
        return
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == syntax


SHIPPED = sorted(Path(get_testdata_file("MR_small.dcm", download=False)).parent.rglob("*"))


def test_the_images_that_pydicom_ships_are_read_as_simpleitk_reads_them_or_refused(tmp_path):
    """Those without a place in the world, in colour, truncated or padded are refused; no other error is raised."""
    read = set()
    for path in SHIPPED:
        if not is_dicom(path) and path.suffix != ".dcm":
            continue
        try:
            scan = read_scan(path)
        except UserError:
            continue
        read.add(path.name)
        oracle = sitk.ReadImage(path)
        np.testing.assert_array_equal(scan.array[0], sitk.GetArrayFromImage(oracle).transpose(2, 1, 0))
        lps = oracle.TransformIndexToPhysicalPoint((0, 0, 0)), oracle.TransformIndexToPhysicalPoint((3, 2, 0))
        for index, place in zip(((0, 0, 0), (3, 2, 0)), lps, strict=True):
            np.testing.assert_allclose((scan.affine @ [*index, 1])[:3], np.array(place) * [-1, -1, 1], atol=1e-3)
    expected = {"693_J2KI.dcm", "CT_small.dcm", "J2K_pixelrep_mismatch.dcm", "MR_small.dcm", "examples_overlay.dcm"}
    expected |= {f"MR_small_{end}.dcm" for end in ("RLE", "bigendian", "expb", "implicit", "jp2klossless")}
    assert read >= expected | {"MR_small_jpeg_ls_lossless.dcm"}
    assert not read & {"MR_truncated.dcm", "MR_small_padded.dcm", "rtdose.dcm", "liver_1frame.dcm", "badVR.dcm"}


def test_studies_that_pydicom_ships(tmp_path):
    """Each holds several series, the last also radiographs, which have no place in the world and hinder no other."""
    angiography, heart, head = (next(p for p in SHIPPED if p.name == n) for n in ("98892003", "98892001", "77654033"))
    with pytest.raises(UserError, match=r"it holds 7 series \(700: ANGIO Projected from   C, 7 slices; .*--series 700"):
        read_scan(angiography)
    with pytest.raises(UserError, match="size, spacing or orientation differs"):  # a projection turns
        read_scan(angiography, series="700")
    with pytest.raises(UserError, match=r"4: Scout, 2 slices; 5: SmartScore - Gated 0\.5 sec, 5 slices"):
        read_scan(heart)
    scan, alone = read_scan(heart, series="5"), read_scan(heart / "CT5N")
    assert scan.shape == (16, 16, 5)
    np.testing.assert_array_equal(scan.array, alone.array)
    assert_same_place(heart / "CT5N")
    with pytest.raises(UserError, match="17106 and 17136 lie 202 mm apart"):
        read_scan(head)
    with pytest.raises(UserError, match="lacks the slice's geometry"):
        read_scan(head / "CR1")


def test_a_tilted_gantry_is_kept_as_shear(tmp_path):
    folder = tmp_path / "tilted"
    folder.mkdir()
    for z in range(SLICES):
        position = [round(float(v), 6) for v in TURN @ [0, 0.5 * z, 2 * z]]
        slice_at(z, VALUES[:, :, z], ImagePositionPatient=position).save_as(folder / f"{z}.dcm")
    scan = read_scan(folder)
    assert "sheared" in scan.warnings[0]
    np.testing.assert_allclose(scan.affine[:3, 2] * [-1, -1, 1], TURN @ [0, 0.5, 2], atol=1e-5)


def test_a_missing_slice_is_refused_and_the_gap_named(tmp_path, dicom):
    what = refusal(make_series(tmp_path / "gap", [0, 1, 3, 4, 5]))
    assert "a slice is missing" in what
    assert "7.dcm and 10.dcm lie 5 mm apart, most slices 2.5 mm" in what
    broken = tmp_path / "real"
    shutil.copytree(sorted(dicom.iterdir())[0], broken)
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(broken))
    Path(files[len(files) // 2]).unlink()
    assert "2 mm apart, most slices 1 mm" in refusal(broken)


def test_a_duplicated_slice_is_refused(tmp_path):
    folder = make_series(tmp_path / "series")
    shutil.copy(folder / "7.dcm", folder / "copy.dcm")
    what = refusal(folder)
    assert "same place" in what
    assert "copy.dcm" in what


def test_several_series_are_listed_and_one_is_chosen(tmp_path):
    folder = make_series(tmp_path / "two", SeriesNumber=3, SeriesDescription="T1\x1b[31m\n MPRAGE")
    other = generate_uid()
    slice_at(3.0, VALUES[:, :, 5], SeriesInstanceUID=other, SeriesNumber=12).save_as(folder / "other.dcm")
    what = refusal(folder)
    assert "it holds 2 series (3: T1[31m MPRAGE, 6 slices; 12: no description, 1 slices)" in what
    for name in ("12", other):
        scan = read_scan(folder, series=name)
        np.testing.assert_array_equal(scan.array[0], VALUES[:, :, 5:])
        assert scan.series == name
    np.testing.assert_array_equal(read_scan(folder, series="3").array[0], VALUES)
    with pytest.raises(UserError, match=r"it holds no series 4 \(3: T1.*Choose one: --series 3"):
        read_scan(folder, series="4")


def test_series_of_one_number_are_told_apart_by_their_uid(tmp_path):
    folder, other = make_series(tmp_path / "two", SeriesNumber=3), generate_uid()
    slice_at(3.0, SeriesInstanceUID=other, SeriesNumber=3).save_as(folder / "other.dcm")
    with pytest.raises(UserError, match="no series 3"):
        read_scan(folder, series="3")
    assert f"{other}: no description, 1 slices" in refusal(folder)
    assert read_scan(folder, series=other).shape == (COLUMNS, ROWS, 1)


def test_a_series_in_nested_folders_is_one(tmp_path):
    make_series(tmp_path / "study")
    (tmp_path / "study/a/b").mkdir(parents=True)
    (tmp_path / "study/7.dcm").rename(tmp_path / "study/a/b/7.dcm")
    np.testing.assert_array_equal(read_scan(tmp_path / "study").array[0], VALUES)


@pytest.mark.parametrize("syntax", [None, RLELossless])
def test_frames_of_one_file_lie_where_the_slices_of_many_lie(tmp_path, syntax):
    path = enhanced(tmp_path / "all.dcm", [3, 0, 5, 1, 4, 2])
    if syntax:
        image = pydicom.dcmread(path)
        image.compress(syntax, generate_instance_uid=False)
        image.save_as(path)
    scan, series = read_scan(path), read_scan(make_series(tmp_path / "series"))
    assert (scan.name, scan.kind) == ("all", "dicom")
    np.testing.assert_array_equal(scan.array[0], VALUES * (1 + np.arange(SLICES)) - 3)
    np.testing.assert_allclose(scan.affine, series.affine, atol=1e-6)


def test_a_frame_that_is_missing_or_has_no_place_is_refused(tmp_path):
    what = refusal(enhanced(tmp_path / "gap.dcm", [0, 1, 3, 4]))
    assert "gap.dcm (frame 2) and gap.dcm (frame 3) lie 5 mm apart" in what
    assert "same place" in refusal(enhanced(tmp_path / "twice.dcm", [0, 1, 1, 2]))
    path = enhanced(tmp_path / "fewer.dcm")
    image = pydicom.dcmread(path)
    del image.PerFrameFunctionalGroupsSequence[-1]
    image.save_as(path)
    assert "several frames without a place" in refusal(path)


def test_derived_objects_beside_a_series_are_ignored(tmp_path):
    folder = make_series(tmp_path / "series")
    mask = slice_at(0, SeriesInstanceUID=generate_uid(), NumberOfFrames="3")
    mask.SOPClassUID = mask.file_meta.MediaStorageSOPClassUID = SegmentationStorage
    mask.save_as(folder / "mask.dcm")
    assert read_scan(folder).warnings == ("1 files that are no DICOM slices were ignored",)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"PixelSpacing": [1.1, 0.8]}, "spacing or orientation differs"),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}, "spacing or orientation differs"),
        (
            {"Columns": COLUMNS + 1, "PixelData": bytes(2 * ROWS * (COLUMNS + 1))},
            "size, spacing or orientation differs",
        ),
        ({"Rows": ROWS + 1}, "holds 40 bytes of pixels, Rows x Columns promise 48"),
        ({"Rows": 60000, "Columns": 60000}, "promise 7200000000"),
        ({"PixelData": VALUES[:, :, 0].tobytes()[:10]}, "holds 10 bytes of pixels"),
        ({"PixelData": None}, "no pixel data"),
        ({"RescaleSlope": "0", "RescaleIntercept": "5"}, "RescaleSlope is 0"),
        ({"ImagePositionPatient": None}, "lacks the slice's geometry"),
        ({"PixelSpacing": None}, "lacks the slice's geometry"),
        ({"NumberOfFrames": "3"}, "several frames"),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "colours"),
        ({"ModalityLUTSequence": [Dataset()]}, "lookup table"),
        ({"PixelSpacing": [-1.1, 0.7]}, "lacks the slice's geometry"),
        ({"ImageOrientationPatient": [2, 0, 0, 0, 1, 0]}, "lacks the slice's geometry"),
        ({"ImageOrientationPatient": ["nan", 0, 0, 0, 1, 0]}, "lacks the slice's geometry"),
    ],
)
def test_a_slice_that_does_not_fit_is_refused(tmp_path, changes, what):
    folder = make_series(tmp_path / "series")
    slice_at(SLICES * 2.5, **changes).save_as(folder / "odd.dcm")
    with pytest.raises(UserError) as caught:
        read_scan(folder)
    assert what in caught.value.what
    assert caught.value.where.endswith("odd.dcm")


def test_a_transfer_syntax_without_a_decoder_is_refused_by_its_uid(tmp_path):
    folder = make_series(tmp_path / "series")
    odd = slice_at(SLICES * 2.5, PixelData=pydicom.encaps.encapsulate([b"not decoded"]))
    odd["PixelData"].is_undefined_length = True
    odd.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.201"
    odd.save_as(folder / "odd.dcm")
    assert "1.2.840.10008.1.2.4.201" in refusal(folder)
    odd.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    odd.save_as(folder / "odd.dcm")
    assert "1.2.840.10008.1.2.1.99" in refusal(folder)


def test_a_truncated_slice_is_refused(tmp_path):
    folder = make_series(tmp_path / "series")
    whole = (folder / "7.dcm").read_bytes()
    (folder / "7.dcm").write_bytes(whole[:-9])
    assert "31 bytes of pixels" in refusal(folder)
    (folder / "7.dcm").write_bytes(whole[:300])
    assert "damaged" in refusal(folder)
    (folder / "7.dcm").write_bytes(b"")
    assert "damaged" in refusal(folder)


def test_files_that_are_no_images_are_ignored_with_a_warning(tmp_path):
    folder = make_series(tmp_path / "series")
    (folder / "notes.txt").write_text("hello")
    report = slice_at(0, Rows=None, PixelData=None)
    report.SeriesInstanceUID = generate_uid()
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = BasicTextSRStorage
    report.save_as(folder / "report.dcm")
    (folder / "._7.dcm").write_bytes(b"left by a Mac")
    assert read_scan(folder).warnings == ("2 files that are no DICOM slices were ignored",)


def test_a_hostile_patient_name_goes_nowhere(tmp_path, capfd):
    with warnings.catch_warnings(action="ignore"):
        name = "../../x\n\x1b[31m" + "y" * 6000
        folder = make_series(tmp_path / "series", PatientName=name, PatientID="Doe\n4711")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        scan = read_scan(folder)
        labels = np.ones(scan.shape, np.uint8)
        write_rtstruct(labels, scan, {1: "One"}, tmp_path / "rt.dcm")
        write_dicom_seg(labels, scan, {1: "One"}, tmp_path / "seg.dcm")
    shown = (
        "".join(capfd.readouterr()) + repr(scan.warnings) + str(scan.header) + repr([str(w.message) for w in warned])
    )
    assert "x1b" not in shown
    assert "4711" not in shown
    assert "yyyy" not in shown
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rt.dcm", "seg.dcm", "series"]


def test_links_that_leave_the_folder_and_fifos_are_refused(tmp_path):
    folder = make_series(tmp_path / "series")
    slice_at(SLICES * 2.5).save_as(tmp_path / "outside.dcm")
    (folder / "link.dcm").symlink_to(tmp_path / "outside.dcm")
    assert "no regular file of this folder" in refusal(folder)
    (folder / "link.dcm").unlink()
    os.mkfifo(folder / "fifo.dcm")
    assert "no regular file of this folder" in refusal(folder)


def zipped(path: Path, *members: zipfile.ZipInfo | str, content: bytes = b"x") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member in members:
            archive.writestr(member, content)
    return path


def test_a_zip_that_reaches_outside_is_refused(tmp_path):
    link = zipfile.ZipInfo("link.dcm")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    for member in ("../evil.dcm", "/tmp/evil.dcm", "a/../../evil.dcm", "C:\\evil.dcm", ".", link):
        assert "written outside" in refusal(zipped(tmp_path / "bad.zip", member))
    assert [p.name for p in tmp_path.iterdir()] == ["bad.zip"]


def test_a_zip_that_explodes_or_is_damaged_is_refused(tmp_path):
    path = zipped(tmp_path / "bomb.zip", "a.dcm", "b.dcm")
    content = path.read_bytes()
    for entry in [i for i in range(len(content)) if content[i:].startswith(b"PK\1\2")]:
        content = content[: entry + 24] + b"\xfe\xff\xff\xff" + content[entry + 28 :]  # its uncompressed size
    path.write_bytes(content)
    assert "would unzip to" in refusal(path)
    (tmp_path / "half.zip").write_bytes(zipped(tmp_path / "whole.zip", "a.txt").read_bytes()[:40])
    assert "damaged" in refusal(tmp_path / "half.zip")
    assert "no DICOM image" in refusal(tmp_path / "whole.zip")


def test_a_folder_of_series_stands_for_each(tmp_path):
    a, b = make_series(tmp_path / "a"), make_series(tmp_path / "b")
    assert [source.path for source in find_scans([a])] == [a]
    assert [source.path for source in find_scans([tmp_path])] == [a, b]
    with pytest.raises(UserError, match="one channel"):
        read_scan(a, channels=2)


def test_one_slice_is_as_thick_as_it_says(tmp_path):
    scan = read_scan(make_series(tmp_path / "one", [0], SliceThickness="4"))
    assert scan.shape == (COLUMNS, ROWS, 1)
    np.testing.assert_allclose(scan.spacing_mm, (0.7, 1.1, 4), atol=1e-5)
