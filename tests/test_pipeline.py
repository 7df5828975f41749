import dataclasses
import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from medseg_diff.config import Data
from medseg_diff.datasets import pipeline
from medseg_diff.datasets.layouts import Case
from medseg_diff.datasets.pipeline import Preprocessing, load, onto_grid, prepare, preparing, preprocessing, restore
from medseg_diff.scans.geometry import header_for
from medseg_diff.scans.read import Scan

SPACING_MM = (0.8, 1.25, 3.0)
ORIENTATIONS = list(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))
TILT = Rotation.from_euler("xyz", (11, -7, 19), degrees=True).as_matrix()


def mr(spacing_mm: tuple[float, float, float], percentiles: tuple[float, float] = (0.0, 100.0)) -> Preprocessing:
    return Preprocessing(spacing_mm, "mr", (-160.0, 240.0), percentiles)


def ct(low: float, high: float) -> Preprocessing:
    return Preprocessing((1.0, 1.0, 1.0), "ct", (low, high), (0.0, 100.0))


def scan(array: np.ndarray, affine: np.ndarray | None = None) -> Scan:
    """Of an array x y z, or channels x y z."""
    array = np.ascontiguousarray(array if array.ndim == 4 else array[None], np.float32)
    affine = np.eye(4) if affine is None else affine
    return Scan(Path("x.nii"), "x", array, affine, header_for(affine, array.shape[1:]), "nifti", ())


def ras_affine(oblique: bool = False) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = (TILT if oblique else np.eye(3)) @ np.diag(SPACING_MM)
    affine[:3, 3] = (-31, 12, 55)
    return affine


def stored(array: np.ndarray, affine: np.ndarray, order: tuple[int, ...], signs: tuple[int, ...]) -> Scan:
    """The same volume with its axes in another order and direction: axis k of the file is axis order[k] of array."""
    image = nib.Nifti1Image(array.astype(np.float32), affine)
    codes = np.array([[order.index(axis), signs[order.index(axis)]] for axis in range(3)])
    turned = image.as_reoriented(codes)
    return scan(turned.get_fdata(), turned.affine)


def volume(shape: tuple[int, int, int] = (9, 11, 7)) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape)


def blob(affine: np.ndarray, shape: tuple[int, ...], centre_mm: np.ndarray, width_mm: float) -> np.ndarray:
    world = nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    return np.exp(-0.5 * ((world - centre_mm) ** 2).sum(-1) / width_mm**2)


def centre_of(mass: np.ndarray, affine: np.ndarray) -> np.ndarray:
    positions = nib.affines.apply_affine(affine, np.moveaxis(np.indices(mass.shape), 0, -1))
    return (positions * mass[..., None]).sum((0, 1, 2)) / mass.sum()


@pytest.mark.parametrize("oblique", [False, True])
@pytest.mark.parametrize("spacing_mm", [SPACING_MM, (1.0, 1.0, 1.0)])
def test_every_orientation_prepares_to_the_same_array(oblique: bool, spacing_mm: tuple[float, float, float]):
    affine = ras_affine(oblique)
    expected = prepare(scan(volume(), affine), mr(spacing_mm))
    seen = set()
    for order, signs in ORIENTATIONS:
        turned = stored(volume(), affine, order, signs)
        turned = dataclasses.replace(turned, affine=turned.affine.astype(np.float32).astype(float))  # as files hold it
        seen.add(nib.aff2axcodes(turned.affine))
        found = prepare(turned, mr(spacing_mm))
        assert found.shape == expected.shape
        torch.testing.assert_close(found.as_tensor(), expected.as_tensor(), atol=2e-5, rtol=0)
        torch.testing.assert_close(found.affine, expected.affine, atol=1e-5, rtol=0)
    assert len(seen) == 48


def test_the_grid_of_the_network_has_its_spacing_and_covers_the_scan():
    affine, shape = ras_affine(oblique=True), (30, 24, 12)
    centre_mm = nib.affines.apply_affine(affine, (16, 13, 5))
    found = prepare(scan(blob(affine, shape, centre_mm, 4.0), affine), mr((1.0, 1.0, 1.5)))
    grid = found.affine.numpy()
    np.testing.assert_allclose(np.linalg.norm(grid[:3, :3], axis=0), (1, 1, 1.5), atol=1e-5)
    np.testing.assert_allclose(grid[:3, :3] / (1, 1, 1.5), TILT, atol=1e-5)
    image = found.as_tensor()[0].numpy()
    expected = blob(grid, image.shape, centre_mm, 4.0)
    assert np.corrcoef(expected.ravel(), image.ravel())[0, 1] > 0.995
    extent = (np.array(shape) - 1) * SPACING_MM
    covered = (np.array(image.shape) - 1) * (1, 1, 1.5)
    assert (abs(covered - extent) <= np.array((1, 1, 1.5)) / 2 + 1e-6).all()


@pytest.mark.parametrize("oblique", [False, True])
def test_restore_brings_a_blob_back_to_its_place_in_the_world(oblique: bool):
    affine, shape = ras_affine(oblique), (22, 18, 9)
    centre_mm = nib.affines.apply_affine(affine, (11.3, 8.1, 4.2))
    for order, signs in ORIENTATIONS:
        original = stored(np.zeros(shape), affine, order, signs)
        prepared = prepare(original, mr((1.0, 1.0, 1.0)))
        grid = prepared.affine
        found = restore(torch.from_numpy(blob(grid.numpy(), prepared.shape[1:], centre_mm, 2.5)), grid, original)
        assert found.shape == original.shape
        np.testing.assert_allclose(centre_of(found, original.affine), centre_mm, atol=0.1)
        expected = blob(original.affine, original.shape, centre_mm, 2.5)
        np.testing.assert_allclose(found, expected, atol=0.06)


@pytest.mark.parametrize("oblique", [False, True])
def test_restore_is_exact_where_the_grid_is_only_reoriented(oblique: bool, monkeypatch: pytest.MonkeyPatch):
    shape = (9, 11, 7)
    labels = np.random.default_rng(1).integers(0, 4, shape)
    monkeypatch.setattr(pipeline, "SLAB_VOXELS", 200)  # several slabs, the last one thinner
    for order, signs in ORIENTATIONS:
        original = stored(labels, ras_affine(oblique), order, signs)
        grid = prepare(original, mr(SPACING_MM)).affine
        frames = [restore(torch.from_numpy((labels == k).astype(float)), grid, original) for k in range(4)]
        np.testing.assert_array_equal(np.argmax(frames, axis=0), original.array[0])


def test_slabs_do_not_change_what_is_restored(monkeypatch: pytest.MonkeyPatch):
    original = scan(volume((12, 10, 23)), ras_affine(oblique=True))
    prepared = prepare(original, mr((1.0, 1.0, 1.0)))
    whole = restore(prepared.as_tensor()[0], prepared.affine, original)
    monkeypatch.setattr(pipeline, "SLAB_VOXELS", 500)
    np.testing.assert_allclose(restore(prepared.as_tensor()[0], prepared.affine, original), whole, atol=1e-6)


def test_the_grid_of_a_sheared_scan_is_straight_and_covers_it():
    affine = ras_affine(oblique=True)
    affine[:3, 1] += 0.2 * affine[:3, 0]
    shape = (30, 24, 12)
    centre_mm = nib.affines.apply_affine(affine, (14.2, 12.4, 5.3))
    prepared = prepare(scan(blob(affine, shape, centre_mm, 4.0), affine), mr((1.0, 1.0, 1.0)))
    grid = prepared.affine.numpy()
    np.testing.assert_allclose(grid[:3, :3].T @ grid[:3, :3], np.eye(3), atol=1e-6)
    expected = blob(grid, prepared.shape[1:], centre_mm, 4.0)
    assert np.corrcoef(expected.ravel(), prepared.numpy().ravel())[0, 1] > 0.99
    corners = nib.affines.apply_affine(
        np.linalg.inv(grid) @ affine, np.indices((2, 2, 2)).reshape(3, 8).T * (29, 23, 11)
    )
    assert (corners > -0.51).all()
    assert (corners < np.array(prepared.shape[1:]) - 0.49).all()
    back = restore(torch.from_numpy(expected), prepared.affine, scan(np.zeros(shape), affine))
    np.testing.assert_allclose(back, blob(affine, shape, centre_mm, 4.0), atol=0.06)


def test_ct_is_a_window_in_hounsfield_units():
    array = np.array([-1000, -160, -60, 40, 140, 240, 3000.0]).reshape(7, 1, 1)
    found = prepare(scan(array), ct(-160.0, 240.0)).flatten().tolist()
    assert found == pytest.approx([-1, -1, -0.5, 0, 0.5, 1, 1])


def test_mr_is_clipped_at_percentiles_then_has_mean_0_and_variance_1():
    array = np.arange(101.0)  # so that percentile p is the value p
    array[100] = 1e6
    clipped = np.clip(np.arange(101.0), 10, 90)
    expected = (clipped - clipped.mean()) / clipped.std()
    found = prepare(scan(array.reshape(101, 1, 1)), mr((1.0, 1.0, 1.0), percentiles=(10.0, 90.0)))
    np.testing.assert_allclose(found.flatten(), expected, atol=1e-5)


def test_every_channel_of_mr_is_normalized_by_itself():
    channels = np.stack([volume(), 100 + 7 * volume()])
    found = prepare(scan(channels, ras_affine()), mr((1.0, 1.0, 1.0), percentiles=(1.0, 99.0)))
    torch.testing.assert_close(found[0].as_tensor(), found[1].as_tensor(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("scale", "offset"), [(1e-6, 0), (1e6, 0), (3.0, 1000), (1, -5000)])
def test_mr_does_not_depend_on_the_scanner_s_scale(scale: float, offset: float):
    how = mr((1.0, 1.0, 1.0), percentiles=(0.5, 99.5))
    expected = prepare(scan(volume(), ras_affine()), how)
    found = prepare(scan(volume() * scale + offset, ras_affine()), how)
    torch.testing.assert_close(found.as_tensor(), expected.as_tensor(), atol=5e-3, rtol=0)


@pytest.mark.parametrize("how", [mr((1.0, 1.0, 1.0)), ct(-160.0, 240.0)])
def test_scans_of_one_slice_and_of_one_value_pass(how: Preprocessing):
    flat = volume((17, 12, 1))
    thick = np.diag([0.5, 2.0, 8.0, 1.0])
    found = prepare(scan(flat, thick), how)
    assert found.shape == (1, 9, 23, 1)
    assert restore(found.as_tensor()[0], found.affine, scan(flat, thick)).shape == (17, 12, 1)
    constant = prepare(scan(np.full((5, 5, 5), 40.0)), how)
    assert torch.equal(constant.as_tensor(), torch.zeros(1, 5, 5, 5))


def test_labels_keep_their_values_and_stay_on_the_structure(tmp_path: Path):
    affine, shape = ras_affine(oblique=True), (22, 18, 9)
    ball = blob(affine, shape, nib.affines.apply_affine(affine, (11, 8, 4)), 4.0)
    original = stored(ball, affine, (2, 0, 1), (-1, 1, -1))
    label = np.where(original.array[0] > 0.5, 70_001, 0)
    image_path, label_path = tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"
    nib.Nifti1Image(original.array[0], original.affine).to_filename(image_path)
    nib.Nifti1Image(label.astype(np.int32), original.affine).to_filename(label_path)
    loaded = load(Case("a", image_path, (label_path,)), 1)
    prepared = preparing(mr((1.0, 1.0, 1.0)), 1)(loaded)
    found = prepared["label_0"].as_tensor()[0].numpy()
    assert set(np.unique(found)) == {0, 70_001}
    truth = blob(prepared["image"].affine.numpy(), found.shape, nib.affines.apply_affine(affine, (11, 8, 4)), 4.0) > 0.5
    overlap = 2 * ((found > 0) & truth).sum() / ((found > 0).sum() + truth.sum())
    assert overlap > 0.85
    torch.testing.assert_close(prepared["image"].as_tensor(), prepare(original, mr((1.0, 1.0, 1.0))).as_tensor())


def test_a_reference_on_the_network_s_grid_is_that_of_training(tmp_path: Path):
    """Also where the scan is oblique and its axes are in another order."""
    source = stored(volume(), ras_affine(oblique=True), (2, 0, 1), (1, -1, -1))
    labels = (source.array[0] > 0).astype(np.uint8)
    for name, array in (("image", source.array[0]), ("label", labels)):
        nib.save(nib.Nifti1Image(array, source.affine), tmp_path / f"{name}.nii")
    prepared = preparing(mr((1.03, 1.49, 2.07)), 1)(
        load(Case("a", tmp_path / "image.nii", (tmp_path / "label.nii",)), 1)
    )
    expected = prepared["label_0"].numpy()[0]
    assert 0.3 < expected.mean() < 0.7
    found = onto_grid(labels, source.affine, prepared["image"].affine, expected.shape)
    assert (found != expected).mean() < 0.01  # a tie between two voxels is left to rounding errors


def test_what_the_grid_cannot_hold_does_not_alias(monkeypatch: pytest.MonkeyPatch):
    """Voxels black and white by turns are gray from afar, but every second one of them is black."""
    board = (np.indices((25, 21, 17)).sum(0) % 2).astype(float)
    how = Preprocessing((1.0, 1.0, 1.0), "ct", (0.0, 1.0), (0.0, 100.0))
    inner = (0, *3 * [slice(1, -1)])
    for spacing_mm, largest in (((0.5, 0.5, 0.5), 0.01), ((0.5, 1.0, 1.0), 0.15)):
        fine = scan(board, np.diag([*spacing_mm, 1]))
        assert prepare(fine, how)[inner].abs().max() < largest
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "_smoothed", lambda image, growth: image)
            assert prepare(fine, how)[inner].abs().min() > 0.999
    for spacing_mm in ((1.0, 1.0, 1.0), (2.0, 2.0, 2.0)):
        same = scan(board, np.diag([*spacing_mm, 1]))
        assert torch.equal(
            prepare(same, dataclasses.replace(how, spacing_mm=spacing_mm))[0], torch.from_numpy(board * 2 - 1).float()
        )


def test_a_blurred_scan_keeps_its_mass_and_its_place():
    affine = np.diag([0.5, 0.5, 1.0, 1])
    point = np.zeros((41, 41, 9))
    point[20, 20, 4] = 1.0
    found = prepare(scan(point, affine), Preprocessing((1.5, 1.5, 1.0), "ct", (-1.0, 1.0), (0.0, 100.0)))
    image = found.as_tensor()[0].numpy()
    np.testing.assert_allclose(centre_of(image, found.affine.numpy()), (10, 10, 4), atol=0.05)
    assert image.sum() * 9 == pytest.approx(1, rel=0.1)


def test_preprocessing_is_that_of_the_configuration():
    data = Data(root=Path("d"), size=(32, 32, 32), modality="ct", spacing_mm=(1, 2, 3), window_hu=(-5, 5))
    assert preprocessing(data) == Preprocessing((1.0, 2.0, 3.0), "ct", (-5.0, 5.0), (0.5, 99.5))
