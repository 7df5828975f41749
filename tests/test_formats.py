"""From a file of every kind to a mask of the same kind, through the code of the command, and nothing of a patient."""

import csv
import itertools
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import untrained
from dicom_series import make_series
from scipy.ndimage import center_of_mass, gaussian_filter
from scipy.spatial.transform import Rotation

from medseg_diff.checkpoint import Model, load_model
from medseg_diff.scans.read import read_label_map, read_scan
from medseg_diff.scans.statistics import label_statistics
from medseg_diff.segment import segment_files

SHAPE = (20, 18, 14)
VALUES = (gaussian_filter(np.random.default_rng(0).normal(size=SHAPE), 1.0) * 1000).astype(np.float32)
OBLIQUE = nib.affines.from_matvec(
    Rotation.from_euler("xyz", (11, -7, 19), degrees=True).as_matrix() @ np.diag([1.2, 1.0, 1.5]), [11.0, -23.0, 5.0]
)


@pytest.fixture(scope="module")
def model(models) -> Model:
    return load_model(models["unet"], torch.device("cpu"))


def itk_image(values: np.ndarray, affine: np.ndarray) -> sitk.Image:
    image, lps = sitk.GetImageFromArray(values.T), np.diag([-1, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


def write(path: Path) -> Path:
    """The same volume in every format of volumes, its first slice in those of pictures."""
    if path.suffix in (".png", ".tif"):
        flat = (VALUES[:, :, 0] - VALUES.min()).astype(np.uint16)
        sitk.WriteImage(sitk.GetImageFromArray(flat.T), path)
    elif path.suffix in (".nrrd", ".mha", ".mhd"):
        sitk.WriteImage(itk_image(VALUES, OBLIQUE), path, useCompression=path.suffix != ".mhd")
    else:
        kind = {".hdr": nib.Nifti1Pair, ".nii": nib.Nifti2Image}.get(path.suffix, nib.Nifti1Image)
        nib.save(kind(VALUES, OBLIQUE), path)
    return path


@pytest.mark.parametrize(
    ("given", "mask"),
    [
        ("a.nii.gz", "a_seg.nii.gz"), ("a.nii", "a_seg.nii.gz"), ("a.hdr", "a_seg.nii.gz"), ("a.nrrd", "a_seg.nrrd"),
        ("a.mha", "a_seg.mha"), ("a.mhd", "a_seg.mha"), ("a.png", "a_seg.png"), ("a.tif", "a_seg.tif"),
    ],
)  # fmt: skip
def test_a_mask_is_of_its_scans_kind_and_on_its_grid(model, tmp_path, given, mask):
    path, out = write(tmp_path / given), tmp_path / "out"
    _, refused = segment_files([path], model, out, items=["seg", "labels", "uncertainty", "prob", "report"])
    assert refused == []
    labels = [f"a_label_{value}_{name}" for value, name in ((7, "core"), (205, "shell"))]
    others = ["a_prob.nii.gz", "a_report.json", "a_uncertainty.nii.gz", "report.csv"]
    ending = mask.removeprefix("a_seg")
    assert sorted(p.name for p in out.iterdir()) == sorted([*others, mask, *(name + ending for name in labels)])
    scan = read_scan(path)
    whole, affine = read_label_map(out / mask)
    assert whole.shape == scan.shape
    assert set(np.unique(whole)) == {0, 7, 205}
    np.testing.assert_allclose(affine, scan.affine, atol=1e-5)
    for name, value in zip(labels, (7, 205), strict=True):
        np.testing.assert_array_equal(read_label_map(out / f"{name}{ending}")[0], whole == value)
    prob = np.asarray(nib.load(out / "a_prob.nii.gz").dataobj)
    np.testing.assert_array_equal(np.array([0, 7, 205])[prob.argmax(-1)], whole)
    if ending not in (".png", ".tif", ".nii.gz"):
        native, written = sitk.ReadImage(path), sitk.ReadImage(out / mask)
        for index in ((0, 0, 0), (3, 2, 1), tuple(n - 1 for n in SHAPE)):
            places = [image.TransformIndexToPhysicalPoint(index) for image in (native, written)]
            np.testing.assert_allclose(*places, atol=1e-5)
    elif ending != ".nii.gz":
        assert sitk.ReadImage(out / mask).GetSize() == sitk.ReadImage(path).GetSize()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_model_of_colours_segments_pictures_in_colour(tmp_path, suffix):
    colours = load_model(
        untrained(tmp_path / "rgb.safetensors", "unet", dims=2, channels=("red", "green", "blue")), torch.device("cpu")
    )
    rgb = np.stack([VALUES[:, :, z] for z in (0, 5, 9)], -1)
    rgb = np.interp(rgb, (rgb.min(), rgb.max()), (0, 255)).astype(np.uint8)
    path = tmp_path / f"a.{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(rgb.transpose(1, 0, 2), isVector=True), path)
    [report], _ = segment_files([path], colours, tmp_path / "out", items=["seg", "report"])
    mask = read_label_map(tmp_path / f"out/a_seg.{suffix}")[0][:, :, 0]
    assert mask.shape == SHAPE[:2]
    for label in report["labels"]:
        inside = rgb[mask == label["value"]].mean(0)
        assert [*label["intensity_mean"].values()] == pytest.approx(inside.tolist(), rel=1e-5)
    gray = write(tmp_path / f"gray.{suffix}")
    _, [error] = segment_files([gray], colours, tmp_path / "out", items=["seg"])
    assert "1 values a voxel where 3 are read" in error.what


def test_every_file_of_equal_content_has_equal_bytes(model, tmp_path):
    for name in ("a.nrrd", "a.mha", "a.png", "a.tif"):
        path = write(tmp_path / name)
        for folder in ("one", "two"):
            segment_files([path], model, tmp_path / folder, items=["seg"])
        mask = f"a_seg{path.suffix}"
        assert (tmp_path / "one" / mask).read_bytes() == (tmp_path / "two" / mask).read_bytes()


def turned(values: np.ndarray, affine: np.ndarray, order: tuple[int, ...], signs: tuple[int, ...]) -> nib.Nifti1Image:
    codes = np.array([[order.index(axis), signs[order.index(axis)]] for axis in range(3)])
    return nib.Nifti1Image(values, affine).as_reoriented(codes)


ORIENTATIONS = [*itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3))]
TILTS = [(0, 0, 0), (11, -7, 19), (-35, 20, 5), (44, 40, -30)]


@pytest.mark.slow
@pytest.mark.parametrize("tilt", TILTS)
def test_48_orientations_have_one_mask(model, tmp_path, tilt):
    """On the network's own spacing: nothing is resampled, so the mask is the same voxel for voxel, at its place."""
    affine = nib.affines.from_matvec(Rotation.from_euler("xyz", tilt, degrees=True).as_matrix(), [-31.0, 12.0, 55.0])
    small = VALUES[:12, :11, :10]
    masks, codes = [], set()
    for order, signs in ORIENTATIONS:
        image = turned(small, affine, order, signs)
        nib.save(image, tmp_path / "a.nii.gz")
        segment_files([tmp_path / "a.nii.gz"], model, tmp_path / "out", items=["seg"])
        mask = nib.load(tmp_path / "out/a_seg.nii.gz")
        codes.add(nib.aff2axcodes(mask.affine))
        np.testing.assert_allclose(mask.affine, image.affine, atol=1e-5)
        back = nib.orientations.ornt_transform(nib.io_orientation(mask.affine), nib.io_orientation(affine))
        plain = mask.as_reoriented(back)
        np.testing.assert_allclose(plain.affine, affine, atol=1e-4)
        masks.append(np.asarray(plain.dataobj))
    assert len(codes) == 48
    assert set(np.unique(masks[0])) == {0, 7, 205}
    for mask in masks:
        np.testing.assert_array_equal(mask, masks[0])


def test_statistics_are_those_of_the_voxels(tmp_path):
    rng = np.random.default_rng(1)
    labels = rng.choice(np.array([0, 3, 200], np.int16), (9, 8, 7))
    array = np.stack([rng.normal(1e6, 1, labels.shape), rng.normal(-5, 40, labels.shape)]).astype(np.float32)
    *found, nothing = label_statistics(labels, [3, 200, 999], array, OBLIQUE, ["T1", "T2"])
    for value, statistics in zip((3, 200), found, strict=True):
        inside = array[:, labels == value].astype(float)
        assert list(statistics.intensity_mean) == ["T1", "T2"]
        np.testing.assert_allclose([*statistics.intensity_mean.values()], inside.mean(1), rtol=1e-9)
        np.testing.assert_allclose([*statistics.intensity_std.values()], inside.std(1), rtol=1e-6)
        expected = OBLIQUE @ [*center_of_mass(labels == value), 1]
        np.testing.assert_allclose(statistics.centroid_mm, expected[:3], atol=1e-9)
    assert (nothing.intensity_mean, nothing.intensity_std, nothing.centroid_mm) == (None, None, None)


def test_the_report_has_the_statistics_of_the_mask(model, tmp_path):
    path = write(tmp_path / "a.nrrd")
    [report], _ = segment_files([path], model, tmp_path / "out", items=["seg", "report"])
    scan, (mask, _) = read_scan(path), read_label_map(tmp_path / "out/a_seg.nrrd")
    for label in report["labels"]:
        inside = scan.array[0][mask == label["value"]]
        assert label["intensity_mean"] == {"MR": pytest.approx(inside.mean(), rel=1e-5)}
        assert label["intensity_std"] == {"MR": pytest.approx(inside.std(), rel=1e-5)}
        place = scan.affine @ [*center_of_mass(mask == label["value"]), 1]
        assert label["centroid_mm"] == pytest.approx(place[:3], abs=1e-6)


def test_codes_of_the_configuration_reach_3d_slicer(model, tmp_path):
    codes = {7: ("123037004 |Anatomical Structure|", "10200004 |Liver|")}
    config = model.about.config
    config = config.model_copy(update={"data": config.data.model_copy(update={"codes": codes})})
    coded = replace(model, about=replace(model.about, config=config))
    segment_files([write(tmp_path / "a.mha")], coded, tmp_path, items=["seg-nrrd"])
    image = sitk.ReadImage(tmp_path / "a.seg.nrrd")
    assert "~SCT^123037004^Anatomical Structure~SCT^10200004^Liver~" in image.GetMetaData("Segment0_Tags")
    assert "~SCT^85756007^Tissue~SCT^85756007^Tissue~" in image.GetMetaData("Segment1_Tags")


def test_a_patient_is_named_by_dicom_outputs_alone(model, tmp_path, capfd):
    """Also where the name is hostile."""
    name = "../../etc\x1b[31mSecret^Jane"
    series = make_series(tmp_path / "series", PatientName=name, PatientID="Id4711", StudyDescription="Secret")
    items = ["seg", "labels", "prob", "uncertainty", "preview", "report", "dicom-seg", "rtstruct", "seg-nrrd"]
    [report], refused = segment_files([series], model, tmp_path / "out", items=items)
    assert refused == []
    carrying = {path.name for path in (tmp_path / "out").iterdir() if b"Id4711" in path.read_bytes()}
    assert carrying == {"series_seg.dcm", "series_rtstruct.dcm"}
    told = "".join(capfd.readouterr()) + json.dumps(report)
    for path in (tmp_path / "out").iterdir():
        if path.suffix == ".gz":
            image = nib.load(path)
            told += str(image.header) + repr(image.header.extensions)
        elif path.suffix != ".dcm":
            told += path.read_bytes().decode("latin-1")
    assert "Secret" not in told
    assert "Id4711" not in told
    with (tmp_path / "out/report.csv").open() as file:
        assert {row["name"] for row in csv.DictReader(file)} == {"core", "shell"}
