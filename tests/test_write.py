import errno
import itertools
import os
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from medseg_diff.errors import UserError
from medseg_diff.files import replacing
from medseg_diff.scans.read import read_label_map, read_scan
from medseg_diff.scans.write import write_nifti, write_seg_nrrd

SHAPE, VOXEL = (4, 5, 6), (3, 1, 4)
LABELS = np.zeros(SHAPE, np.uint8)
LABELS[VOXEL] = 2
LABELS[0, 0, 0] = 1
NAMES = {0: "background", 1: "Left\nlung", 2: "Tumour"}
OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.3, -0.2, 0.5) @ np.diag([0.7, 1.1, 2.5]), [-31.0, 12.5, 7.0]
)


def orientations() -> list[np.ndarray]:
    """One affine for each way to lay the three array axes along the world's."""
    matrices = []
    for order, signs in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        matrix = np.zeros((3, 3))
        matrix[order, range(3)] = np.array(signs) * [0.7, 1.1, 2.5]
        matrices.append(nib.affines.from_matvec(matrix, [-31.0, 12.5, 7.0]))
    return matrices


def scan_at(
    folder: Path, affine: np.ndarray = OBLIQUE, change=lambda header: None, name: str = "scan.nii.gz", shape=SHAPE
):
    """A NIfTI scan with marked values, its header changed, as our reader reads it."""
    header = nib.Nifti1Header()
    header.set_qform(affine, 1)
    header.set_sform(affine, 1)
    header.set_xyzt_units("mm")
    change(header)
    values = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    nib.save(nib.Nifti1Image(values, None, header, dtype=np.int16), folder / name)  # None: the header's forms stay
    return read_scan(folder / name)


@pytest.mark.parametrize("affine", [*orientations(), OBLIQUE])
def test_a_marked_voxel_stays_at_its_place_in_the_world(tmp_path, affine):
    scan = scan_at(tmp_path, affine)
    write_nifti([LABELS], scan, tmp_path / "seg.nii.gz", np.uint8)
    write_seg_nrrd(LABELS, scan, NAMES, tmp_path / "seg.seg.nrrd")
    expected = nib.affines.apply_affine(affine, VOXEL)
    mask = nib.load(tmp_path / "seg.nii.gz")
    found = nib.affines.apply_affine(mask.affine, np.argwhere(np.asarray(mask.dataobj) == 2)[0])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    for name in ("seg.nii.gz", "seg.seg.nrrd"):
        image = sitk.ReadImage(tmp_path / name)
        z, y, x = (int(i) for i in np.argwhere(sitk.GetArrayFromImage(image) == 2)[0])
        lps = np.array(image.TransformIndexToPhysicalPoint((x, y, z)))
        np.testing.assert_allclose(lps * [-1, -1, 1], expected, atol=1e-4)
    labels, again = read_label_map(tmp_path / "seg.nii.gz")
    np.testing.assert_array_equal(labels, LABELS)
    np.testing.assert_allclose(again, affine, atol=1e-5)


def test_48_orientations_are_tested():
    assert len({matrix.tobytes() for matrix in orientations()}) == 48


def test_the_grid_of_the_scan_is_kept_to_the_bit(tmp_path):
    def change(header):
        header["qform_code"], header["sform_code"] = 3, 4
        header["qoffset_x"] += 9  # qform and sform that disagree stay as they are
        header.set_xyzt_units("micron", "msec")
        header["srow_x"] *= 1000
        header["srow_y"] *= 1000
        header["srow_z"] *= 1000

    scan = scan_at(tmp_path, change=change)
    np.testing.assert_allclose(scan.affine, OBLIQUE, rtol=1e-6, atol=1e-4)
    write_nifti([LABELS], scan, tmp_path / "seg.nii.gz", np.int16)
    before, after = nib.load(tmp_path / "scan.nii.gz").header, nib.load(tmp_path / "seg.nii.gz").header
    for field in ("qform_code", "sform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "qoffset_x", "xyzt_units"):
        np.testing.assert_array_equal(before[field], after[field])
    np.testing.assert_array_equal(before["pixdim"][:4], after["pixdim"][:4])


@pytest.mark.parametrize("codes", [(0, 0), (1, 0), (0, 2)])
def test_form_codes_survive(tmp_path, codes):
    def change(header):
        header["qform_code"], header["sform_code"] = codes

    scan = scan_at(tmp_path, change=change)
    write_nifti([LABELS], scan, tmp_path / "seg.nii.gz", np.uint8)
    before, after = nib.load(tmp_path / "scan.nii.gz"), nib.load(tmp_path / "seg.nii.gz")
    assert (int(after.header["qform_code"]), int(after.header["sform_code"])) == codes
    np.testing.assert_array_equal(before.affine, after.affine)


def test_nothing_personal_is_copied(tmp_path):
    def change(header):
        for field in ("descrip", "aux_file", "intent_name", "db_name"):
            header[field] = b"Doe^Jane"

    scan = scan_at(tmp_path, change=change, name="scan.nii")
    assert b"Doe" in (tmp_path / "scan.nii").read_bytes()
    write_nifti([LABELS], scan, tmp_path / "seg.nii", np.uint8)
    written = (tmp_path / "seg.nii").read_bytes()
    assert b"Doe" not in written
    assert len(written) == 352 + LABELS.size
    assert struct.unpack("<2f", written[112:120]) == (1, 0)  # scl_slope and scl_inter


def test_frames_are_streamed_into_a_4d_file(tmp_path):
    def frames():
        for value in (0.25, 0.5, 0.75):
            assert not (tmp_path / "prob.nii.gz").exists()
            yield np.full(SHAPE, value)

    scan = scan_at(tmp_path)
    write_nifti(frames(), scan, tmp_path / "prob.nii.gz", np.float32, count=3)
    image = nib.load(tmp_path / "prob.nii.gz")
    assert image.shape == (*SHAPE, 3)
    assert image.get_data_dtype() == np.float32
    np.testing.assert_array_equal(image.get_fdata()[0, 0, 0], [0.25, 0.5, 0.75])
    np.testing.assert_allclose(image.affine, OBLIQUE, atol=1e-5)
    write_nifti([np.zeros(SHAPE)], scan, tmp_path / "one.nii.gz", np.float32, count=1)
    assert nib.load(tmp_path / "one.nii.gz").shape == (*SHAPE, 1)


def test_a_flat_image_gives_a_flat_mask(tmp_path):
    scan = scan_at(tmp_path, shape=(4, 5))
    assert scan.shape == (4, 5, 1)
    write_nifti([LABELS[:, :, :1]], scan, tmp_path / "seg.nii.gz", np.uint8)
    assert nib.load(tmp_path / "seg.nii.gz").shape == (4, 5)


def test_equal_content_gives_equal_bytes(tmp_path):
    scan = scan_at(tmp_path)
    for name in ("a", "b"):
        write_nifti([LABELS], scan, tmp_path / f"{name}.nii.gz", np.uint8)
        write_seg_nrrd(LABELS, scan, NAMES, tmp_path / f"{name}.seg.nrrd")
    for suffix in (".nii.gz", ".seg.nrrd"):
        written = (tmp_path / f"a{suffix}").read_bytes()
        assert written == (tmp_path / f"b{suffix}").read_bytes()
        start = written.index(b"\x1f\x8b\x08")
        assert written[start + 3 : start + 8] == bytes(5)  # gzip's flags (a name would set one) and its time


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([LABELS[1:]], "shape"),
        ([np.full(SHAPE, 256)], "do not fit uint8"),
        ([np.full(SHAPE, -1)], "do not fit uint8"),
        ([], "0 frames came where 1"),
        ([LABELS, LABELS], "2 frames came where 1"),
    ],
)
def test_a_wrong_frame_is_an_error_and_leaves_nothing(tmp_path, frames, message):
    scan = scan_at(tmp_path)
    with pytest.raises(ValueError, match=message):
        write_nifti(frames, scan, tmp_path / "seg.nii.gz", np.uint8)
    assert [p.name for p in tmp_path.iterdir()] == ["scan.nii.gz"]


def test_an_error_leaves_the_old_file(tmp_path):
    path = tmp_path / "seg.nii.gz"
    path.write_bytes(b"old")
    seen = []

    def stop():
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            seen.append(temporary)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert seen[0].parent == tmp_path
    assert seen[0].name.endswith(".nii.gz")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_to_the_user(tmp_path):
    path = tmp_path / "new" / "seg.nii.gz"

    def fill():
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match="No space left on device"):
        fill()
    assert not list(path.parent.iterdir())


def test_a_disk_that_fails_to_keep_the_data_leaves_the_old_file(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    scan = scan_at(tmp_path)
    path = tmp_path / "seg.nii.gz"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="Input/output error"):
        write_nifti([LABELS], scan, path, np.uint8)
    assert path.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scan.nii.gz", "seg.nii.gz"]


def test_a_name_of_255_bytes_can_be_written(tmp_path):
    path = tmp_path / ("a" * 248 + ".nii.gz")
    with replacing(path) as temporary:
        temporary.write_bytes(b"x")
    assert path.read_bytes() == b"x"


def test_3d_slicer_finds_names_values_and_extents(tmp_path):
    write_seg_nrrd(LABELS, scan_at(tmp_path), NAMES, tmp_path / "a.seg.nrrd")
    image = sitk.ReadImage(tmp_path / "a.seg.nrrd")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).transpose(2, 1, 0), LABELS)
    fields = {key: image.GetMetaData(key) for key in image.GetMetaDataKeys()}
    assert [fields[f"Segment{i}_Name"] for i in (0, 1)] == ["Left lung", "Tumour"]
    assert [fields[f"Segment{i}_LabelValue"] for i in (0, 1)] == ["1", "2"]
    assert fields["Segment1_Extent"] == "0 3 0 4 0 5"
    assert fields["Segment0_Color"] != fields["Segment1_Color"]
