"""The Python interface gives what the command writes, from every form that a scan may have in memory."""

import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

import medseg_diff
from medseg_diff.api import Segmenter
from medseg_diff.errors import UserError
from medseg_diff.scans.memory import scan_of
from medseg_diff.segment import segment_files

AFFINE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.2, -0.1, 0.3) @ np.diag([-1.2, 1.0, 1.5]), [11.0, -23.0, 5.0]
)
VALUES = gaussian_filter(np.random.default_rng(0).normal(size=(12, 11, 10)), 1.0).astype(np.float32) * 100


@pytest.fixture(scope="module")
def model(models) -> Segmenter:
    return medseg_diff.load(models["volumes"], device="cpu")


@pytest.fixture
def path(tmp_path) -> Path:
    nib.save(nib.Nifti1Image(VALUES, AFFINE), tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz"


def test_the_result_is_what_the_command_writes(model, path, tmp_path):
    items = {"seg": "mask", "uncertainty": "uncertainty", "prob": "probabilities", "samples": "samples"}
    [report], _ = segment_files([path], model.model, tmp_path, samples=3, seed=5, items=[*items, "report"])
    result = model.segment(path, samples=3, seed=5)
    for item, attribute in items.items():
        written, held = nib.load(tmp_path / f"scan_{item}.nii.gz"), result.to_nibabel(attribute)
        assert np.array_equal(written.dataobj, held.dataobj), item
        assert written.get_data_dtype() == held.get_data_dtype()
        np.testing.assert_allclose(held.affine, written.affine, atol=1e-5)
    assert set(np.unique(result.mask)) == set(result.names) == {0, 7, 205}
    assert [label.volume_ml for label in result.labels] == [label["volume_ml"] for label in report["labels"]]
    assert result.labels[0].volume_ml_interval90 == report["labels"][0]["volume_ml_interval90"]
    assert len(result.samples) == 3
    np.testing.assert_allclose(result.probabilities.sum(0), 1, atol=1e-5)


def test_every_form_in_memory_is_the_same_scan(path):
    wanted = scan_of(path, 1)
    forms = {
        "text": str(path),
        "nibabel": nib.load(path),
        "SimpleITK": sitk.ReadImage(path),
        "array": (VALUES, AFFINE),
        "channels": (VALUES[None], AFFINE.tolist()),
    }
    for name, form in forms.items():
        scan = scan_of(form, 1)
        assert np.array_equal(scan.array, wanted.array), name
        np.testing.assert_allclose(scan.affine, wanted.affine, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(scan.header.get_best_affine(), wanted.affine, atol=1e-4, err_msg=name)


def test_channels_are_the_frames_and_the_components(tmp_path):
    two = np.stack([VALUES, -VALUES])
    image = sitk.GetImageFromArray(two.transpose(3, 2, 1, 0), isVector=True)
    for form in ((two, AFFINE), nib.Nifti1Image(np.moveaxis(two, 0, -1), AFFINE), image):
        assert np.array_equal(scan_of(form, 2).array, two)
        with pytest.raises(UserError, match="2 values a voxel where 1"):
            scan_of(form, 1)


def test_units_of_a_nibabel_image_become_mm():
    image = nib.Nifti1Image(VALUES, np.diag([0.001, 0.002, 0.003, 1]))
    image.header.set_xyzt_units("meter")
    np.testing.assert_allclose(scan_of(image, 1).spacing_mm, (1, 2, 3), rtol=1e-5)


def test_memory_is_trusted_no_more_than_a_file():
    hole = VALUES.copy()
    hole[0, 0, 0] = np.nan
    assert "NaN" in scan_of((hole, AFFINE), 1).warnings[0]
    for values, affine, said in (
        (VALUES * np.nan, AFFINE, "NaN"),
        (VALUES, np.zeros((4, 4)), "0 to|0 x 0|measure"),
        (VALUES.astype(complex), AFFINE, "complex"),
    ):
        with pytest.raises(UserError, match=said):
            scan_of((values, affine), 1)
    for nonsense in (VALUES, 3, (VALUES, np.eye(3)), (VALUES[0], AFFINE)):
        with pytest.raises(ValueError, match="RAS affine"):
            scan_of(nonsense, 1)


def test_a_deterministic_model_has_no_samples(models):
    result = medseg_diff.load(models["unet"], device="cpu").segment((VALUES, AFFINE))
    assert result.samples is None
    assert result.labels[0].volume_ml_interval90 is None
    with pytest.raises(ValueError, match="no samples"):
        result.to_nibabel("samples")


def test_models_are_found_as_the_command_finds_them(models):
    with pytest.raises(UserError, match="no such model"):
        medseg_diff.load("absent")
    with pytest.raises(UserError, match="not segment"):
        medseg_diff.load(models["unconditional"])
    with pytest.raises(UserError, match="deterministic"):
        medseg_diff.load(models["unet"], sampler="ddim")
    with pytest.raises(AttributeError):
        _ = medseg_diff.absent


def test_the_package_is_light_until_it_is_used():
    code = "import sys, medseg_diff; print(sorted({'torch', 'numpy', 'monai'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
