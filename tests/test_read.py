import gzip
import itertools
import os
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from bad_inputs.nifti import AFFINE as OBLIQUE
from bad_inputs.nifti import nifti as nifti_bytes
from PIL import Image

from medseg_diff.errors import UserError
from medseg_diff.scans.read import read_label_map, read_scan, scan_name

RAMP = np.arange(4 * 5 * 6, dtype=np.float32).reshape(4, 5, 6)


def nifti(values: np.ndarray = RAMP, **fields: Any) -> bytes:
    return nifti_bytes(values, **fields)


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def refusal(path: Path, channels: int = 1) -> str:
    """The message of the refusal, which names the file and says what to do, fast and with little memory."""
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(UserError) as caught:
        read_scan(path, channels)
    assert time.perf_counter() - start < 2
    assert tracemalloc.get_traced_memory()[1] < 150e6
    tracemalloc.stop()
    assert path.name in str(caught.value)
    assert len(caught.value.advice) > 10
    return caught.value.what


def test_a_scan_is_what_nibabel_reads(tmp_path):
    path = tmp_path / "knee.nii.gz"
    nib.save(nib.Nifti1Image(RAMP.astype(np.int16), OBLIQUE), path)
    scan = read_scan(path)
    assert scan.name == "knee"
    assert scan.kind == "nifti"
    assert scan.shape == (4, 5, 6)
    assert scan.array.flags.c_contiguous
    np.testing.assert_array_equal(scan.array[0], RAMP)
    np.testing.assert_allclose(scan.affine, OBLIQUE, atol=1e-5)
    np.testing.assert_allclose(scan.spacing_mm, (0.7, 1.1, 2.5), rtol=1e-6)
    assert scan.voxel_ml == pytest.approx(0.7 * 1.1 * 2.5 / 1000)
    assert scan.warnings == ()


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_every_number_type_gives_the_same_values(tmp_path, dtype):
    scan = read_scan(write(tmp_path, "a.nii", nifti(RAMP.astype(dtype))))
    np.testing.assert_array_equal(scan.array[0], RAMP)


def test_zero_slope_means_unscaled(tmp_path):
    scan = read_scan(write(tmp_path, "a.nii", nifti(scl_slope=0, scl_inter=7)))
    np.testing.assert_array_equal(scan.array[0], RAMP)


GOOD = gzip.compress(nifti(), mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("empty.nii", b"", "empty"),
        ("text.nii", b"not a scan " * 100, "not a NIfTI"),
        ("cut.nii", nifti()[:-1], "ends after 479 of the 480 bytes"),
        ("bomb.nii.gz", gzip.compress(nifti() + bytes(1 << 26), 1), "far more data"),
        ("flat.nii", nifti(srow_y=[0, 0, 0, 0], srow_z=[0, 1, 2, 0]), "singular"),
        ("quaternion.nii", nifti(quatern_b=2.0), "quaternion"),
        ("wrong_metres.nii", nifti(affine=np.eye(4), xyzt_units=1), "1000 x 1000 x 1000 mm"),
    ],
)
def test_refused(tmp_path, name, content, what):
    assert what in refusal(write(tmp_path, name, content))


def test_zero_padding_after_gzip_is_no_junk(tmp_path):
    assert read_scan(write(tmp_path, "a.nii.gz", GOOD + bytes(512))).warnings == ()


def test_nan_and_infinity_become_the_nearest_finite_value(tmp_path):
    values = RAMP.copy()
    values[1, 1, 1], values[2, 2, 2], values[3, 3, 3] = np.nan, np.inf, -np.inf
    values[0, 0, 0] = 0.5
    scan = read_scan(write(tmp_path, "a.nii", nifti(values)))
    assert "3 voxels were NaN or infinite" in scan.warnings[0]
    assert scan.array[0, 1, 1, 1] == 0.5
    assert scan.array[0, 2, 2, 2] == RAMP.max()
    assert scan.array[0, 3, 3, 3] == 0.5


def test_huge_values_keep_their_contrast_and_can_be_squared(tmp_path):
    scan = read_scan(write(tmp_path, "a.nii", nifti(RAMP.astype(np.float64) * 1e306)))
    assert "huge" in scan.warnings[0]
    assert np.isfinite(np.square(scan.array).sum(dtype=np.float32))
    assert np.corrcoef(scan.array.ravel(), RAMP.ravel())[0, 1] > 0.999


def test_one_huge_value_does_not_flatten_the_others(tmp_path):
    values = np.arange(1000, dtype=np.float64).reshape(10, 10, 10)
    values[0, 0, 0] = 1e308
    scan = read_scan(write(tmp_path, "a.nii", nifti(values)))
    assert scan.array[0, 0, 0, 0] == np.float32(1e12)
    np.testing.assert_array_equal(scan.array.ravel()[1:], np.arange(1, 1000))


def test_channels_come_first_and_must_match(tmp_path):
    path = write(tmp_path, "a.nii", nifti(np.stack([RAMP, RAMP + 1], -1)))
    scan = read_scan(path, channels=2)
    np.testing.assert_array_equal(scan.array[1], RAMP + 1)
    assert scan.shape == RAMP.shape
    assert "2 volumes where 3 are read" in refusal(path, channels=3)
    assert "1 volumes where 2 are read" in refusal(write(tmp_path, "b.nii", nifti()), channels=2)


def test_one_frame_is_squeezed_and_a_flat_image_is_one_thick(tmp_path):
    assert read_scan(write(tmp_path, "a.nii", nifti(RAMP[..., None]))).shape == (4, 5, 6)
    assert read_scan(write(tmp_path, "b.nii", nifti(RAMP[:, :, 0]))).shape == (4, 5, 1)


def test_no_hang_on_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo.nii.gz")
    (tmp_path / "folder.nii.gz").mkdir()
    (tmp_path / "broken.nii.gz").symlink_to(tmp_path / "nowhere")
    assert "neither a file" in refusal(tmp_path / "fifo.nii.gz")
    assert "no DICOM image" in refusal(tmp_path / "folder.nii.gz")
    assert "does not exist" in refusal(tmp_path / "broken.nii.gz")
    assert "does not exist" in refusal(tmp_path / "absent.nii.gz")
    assert "kind is not known" in refusal(write(tmp_path, "a.jpg", b"x"))
    long = tmp_path / ("a" * 300 + ".nii.gz")
    assert "File name too long" in refusal(long)


def image() -> sitk.Image:
    result = sitk.GetImageFromArray(RAMP.astype(np.int16).transpose(2, 1, 0))
    lps = np.diag([-1, -1, 1, 1]) @ OBLIQUE
    result.SetSpacing((0.7, 1.1, 2.5))
    result.SetDirection((lps[:3, :3] / [0.7, 1.1, 2.5]).ravel())
    result.SetOrigin(lps[:3, 3])
    return result


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("suffix", ["nrrd", "mha", "mhd"])
def test_nrrd_and_mha_lie_where_the_nifti_lies(tmp_path, suffix, compress):
    path = tmp_path / f"a.{suffix}"
    sitk.WriteImage(image(), path, useCompression=compress)
    scan = read_scan(path)
    assert scan.kind == ("nrrd" if suffix == "nrrd" else "mha")
    np.testing.assert_array_equal(scan.array[0], RAMP)
    np.testing.assert_allclose(scan.affine, OBLIQUE, atol=1e-5)
    np.testing.assert_allclose(scan.header.get_best_affine(), OBLIQUE, atol=1e-5)
    assert scan.warnings == ()


@pytest.mark.parametrize("suffix", ["nrrd", "mha"])
def test_damaged_nrrd_and_mha_are_refused(tmp_path, suffix):
    sitk.WriteImage(image(), tmp_path / f"a.{suffix}", useCompression=True)
    good = (tmp_path / f"a.{suffix}").read_bytes()
    start = good.index(b"\n\n" if suffix == "nrrd" else b"LOCAL\n") + 40
    flipped = good[:start] + bytes([good[start] ^ 16]) + good[start + 1 :]
    assert "damaged" in refusal(write(tmp_path, f"flipped.{suffix}", flipped))
    assert "too early" in refusal(write(tmp_path, f"half.{suffix}", good[: start + 20]))
    assert "damaged" in refusal(write(tmp_path, f"empty.{suffix}", b""))
    assert "damaged" in refusal(write(tmp_path, f"text.{suffix}", b"not a scan"))
    sitk.WriteImage(image(), tmp_path / f"raw.{suffix}", useCompression=False)
    raw = (tmp_path / f"raw.{suffix}").read_bytes()
    assert "do not fill the 240 bytes" in refusal(write(tmp_path, f"short.{suffix}", raw[:-1]))
    wide = good.replace(b"4 5 6", b"9000 9000 9000", 1)
    assert "more than the 1073741824" in refusal(write(tmp_path, f"wide.{suffix}", wide))
    longer = good.replace(b"4 5 6", b"4 5 5", 1)
    assert "do not fill" in refusal(write(tmp_path, f"longer.{suffix}", longer))


def test_an_mha_of_too_many_dimensions_is_refused(tmp_path):
    sitk.WriteImage(image(), tmp_path / "a.mha")
    many = (tmp_path / "a.mha").read_bytes().replace(b"NDims = 3", b"NDims = 333", 1)
    assert "it promises 333 dimensions" in refusal(write(tmp_path, "many.mha", many))


def test_an_mha_without_voxels_is_refused(tmp_path):
    sitk.WriteImage(image(), tmp_path / "a.mha")
    none = (tmp_path / "a.mha").read_bytes().replace(b"4 5 6", b"4 5 0", 1)
    assert "it holds no voxels" in refusal(write(tmp_path, "none.mha", none))


def test_an_mhd_reads_no_file_from_elsewhere(tmp_path):
    path = tmp_path / "a.mhd"
    sitk.WriteImage(image(), path)
    (tmp_path / "secret").mkdir()
    (tmp_path / "a.raw").rename(tmp_path / "secret/a.raw")
    path.write_text(path.read_text().replace("a.raw", "secret/a.raw"))
    assert "not beside it" in refusal(path)


@pytest.mark.parametrize("suffix", ["png", "tif", "tiff"])
def test_a_picture_is_one_voxel_thick(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(RAMP[:, :, 0].astype(np.uint16).T), path)
    scan = read_scan(path)
    np.testing.assert_array_equal(scan.array[0, :, :, 0], RAMP[:, :, 0])
    assert "1 mm is assumed" in scan.warnings[0]
    assert scan.kind == ("png" if suffix == "png" else "tiff")
    color = tmp_path / f"color.{suffix}"
    rgb = np.random.default_rng(0).integers(0, 255, (5, 4, 3), np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(rgb, isVector=True), color)
    assert "3 values a voxel" in refusal(color)
    np.testing.assert_array_equal(read_scan(color, channels=3).array[..., 0], rgb.transpose(2, 1, 0))


def test_pictures_that_would_be_read_wrongly_are_refused(tmp_path):
    """ITK makes four colours of a TIFF that it does not know, and 0.08 mm of 300 dots per inch."""
    gray = (RAMP[:, :, 0] * 500).astype(np.uint16)
    tifffile.imwrite(tmp_path / "dots.tif", gray, resolution=(300, 300), resolutionunit="INCH")
    assert read_scan(tmp_path / "dots.tif").spacing_mm == (1, 1, 1)
    tifffile.imwrite(tmp_path / "tiled.tif", gray, tile=(16, 16))
    tifffile.imwrite(tmp_path / "pages.tif", np.stack([gray] * 3), photometric="minisblack")
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((5, 4, 4), np.uint8), isVector=True), tmp_path / "alpha.png")
    assert "4 values a voxel" in refusal(tmp_path / "tiled.tif")
    assert "unusual kind of pixels" in refusal(tmp_path / "tiled.tif", channels=4)
    assert "several pages" in refusal(tmp_path / "pages.tif")
    assert "transparency" in refusal(tmp_path / "alpha.png", channels=4)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_damaged_pictures_are_refused(tmp_path, suffix):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 40), np.uint8)).save(
        tmp_path / f"a.{suffix}", **({"compression": "tiff_deflate"} if suffix == "tif" else {})
    )
    good = (tmp_path / f"a.{suffix}").read_bytes()
    assert read_scan(tmp_path / f"a.{suffix}").shape == (40, 50, 1)
    for name, content in {"half": good[:1000], "cut": good[:-9], "flipped": good[:900] + b"x" + good[901:]}.items():
        assert "damaged" in refusal(write(tmp_path, f"{name}.{suffix}", content))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("packed", [bytes, gzip.compress])
def test_a_pair_of_files_reads_as_one(tmp_path, version, packed):
    whole = nifti(version=version)
    start = len(whole) - RAMP.nbytes
    header = bytearray(whole[: start - 4])
    place = 344 if version == 1 else 4
    header[place : place + 3] = b"ni%d" % version
    header[108:112] = struct.pack("<f", 16) if version == 1 else header[108:112]
    header[168:176] = struct.pack("<q", 16) if version == 2 else header[168:176]
    write(tmp_path, "a.hdr", bytes(header))
    assert "there is no a.img beside it" in refusal(tmp_path / "a.hdr")
    write(tmp_path, "a.img", packed(bytes(16) + whole[start:]))
    for name in ("a.hdr", "a.img"):
        scan = read_scan(tmp_path / name)
        np.testing.assert_array_equal(scan.array[0], RAMP)
        np.testing.assert_allclose(scan.affine, OBLIQUE, atol=1e-5)
        assert (scan.name, scan.kind, scan.warnings) == ("a", "nifti", ())
    write(tmp_path, "a.img", packed(whole[start:]))
    with pytest.raises(UserError, match=r"a.img: it ends after 464 of the 480 bytes"):
        read_scan(tmp_path / "a.hdr")
    with pytest.raises(UserError, match=r"alone.hdr: it does not exist"):
        read_scan(write(tmp_path, "alone.img", b"x"))
    assert "wrong" in refusal(write(tmp_path, "whole.hdr", whole))


def test_label_maps_are_whole_numbers(tmp_path):
    labels = (RAMP.astype(np.int64) % 3) * 200
    values, affine = read_label_map(write(tmp_path, "a.nii", nifti(labels.astype(np.float64))))
    np.testing.assert_array_equal(values, labels)
    assert values.dtype == np.int16
    np.testing.assert_allclose(affine, OBLIQUE, atol=1e-5)
    values, _ = read_label_map(write(tmp_path, "b.nii", nifti(labels.astype(np.int32) + 2**24 + 1)))
    np.testing.assert_array_equal(values, labels + 2**24 + 1)
    for name, bad in {"half": labels + 0.5, "nan": labels * np.nan, "huge": labels + 1e12}.items():
        with pytest.raises(UserError, match=f"{name}.nii: it is no label map"):
            read_label_map(write(tmp_path, f"{name}.nii", nifti(bad.astype(np.float64))))
    with pytest.raises(UserError, match=r"minus.nii: it holds the label value -1\..* positive"):
        read_label_map(write(tmp_path, "minus.nii", nifti((labels - 1).astype(np.int16))))
    with pytest.raises(UserError, match="2 volumes"):
        read_label_map(write(tmp_path, "frames.nii", nifti(np.stack([RAMP, RAMP], -1))))


def test_names(tmp_path):
    (tmp_path / "series.v2").mkdir()
    assert [scan_name(Path(p)) for p in ("a/knee.nii.gz", "knee.v2.nrrd", "K.NII.GZ", "s.zip")] == [
        "knee",
        "knee.v2",
        "K",
        "s",
    ]
    assert scan_name(tmp_path / "series.v2") == "series.v2"


@pytest.mark.parametrize("line", [b"[" * 3000, b"kinds: " + b"9" * 3000, b"sizes"])
def test_a_line_that_would_kill_the_library_is_refused(tmp_path, line):
    """Found by fuzzing: SimpleITK ends the process with a segmentation fault."""
    sitk.WriteImage(image(), tmp_path / "a.nrrd")
    content = (tmp_path / "a.nrrd").read_bytes()
    bad = write(tmp_path, "bad.nrrd", content.replace(b"endian: little", b"endian: little\n" + line))
    assert "no field" in refusal(bad)
    key = write(tmp_path, "key.nrrd", content.replace(b"endian: little", b"endian: little\nkey:=" + 3000 * b"x"))
    assert read_scan(key).shape == read_scan(tmp_path / "a.nrrd").shape


def test_a_real_scan_reads_as_nibabel_reads_it(hippocampus):
    for path in itertools.islice(sorted((hippocampus / "imagesTr").glob("*.nii.gz")), 5):
        scan, oracle = read_scan(path), nib.load(path)
        np.testing.assert_array_equal(scan.array[0], oracle.get_fdata(dtype=np.float32))
        np.testing.assert_array_equal(scan.affine, oracle.affine)
        assert scan.warnings == ()
