import filecmp
import json

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import label as components

from medseg_diff.datasets.anatomy import Ellipsoid, Tube, grow_vessels, signed_distance
from medseg_diff.datasets.layouts import read_dataset
from medseg_diff.datasets.phantom import GRIDS, draw_case, make_phantom
from medseg_diff.errors import UserError

SHAPE, SPACING_MM = (48, 48, 28), (0.9, 0.9, 2.0)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantom") / "set"
    make_phantom(folder, cases=5, modality="ct", raters=1, seed=3)
    return read_dataset(folder)


def best_threshold_dice(image, mask):
    """The best Dice of any band low <= intensity < high, taken from histograms."""
    edges = np.quantile(image, np.linspace(0, 1, 65))
    inside = np.concatenate([[0], np.histogram(image[mask], edges)[0].cumsum()])
    total = np.concatenate([[0], np.histogram(image, edges)[0].cumsum()])
    low, high = np.triu_indices(len(edges), 1)
    return (2 * (inside[high] - inside[low]) / (total[high] - total[low] + mask.sum())).max()


@pytest.mark.parametrize("modality", ["ct", "mr"])
def test_no_threshold_solves_it(modality):
    for seed in range(3):
        image, label_map = draw_case(np.random.default_rng(seed), (80, 80, 40), (0.6, 0.6, 1.5), modality)
        for value, limit in ((1, 0.75), (2, 0.4), (3, 0.2)):
            assert best_threshold_dice(image, label_map == value) < limit, (seed, value)


@pytest.mark.parametrize("seed", range(4))
def test_lesions_and_vessels_lie_in_one_organ(seed):
    _, label_map = draw_case(np.random.default_rng(seed), SHAPE, SPACING_MM, "ct")
    assert set(np.unique(label_map)) == {0, 1, 2, 3}
    blobs, _ = components(label_map > 0, np.ones((3, 3, 3)))
    assert np.bincount(blobs.ravel())[1:].max() > 0.97 * (label_map > 0).sum()
    right = np.argwhere(label_map == 1).mean(0)[0]
    assert right > SHAPE[0] / 2, "the organ lies on the patient's right"


def test_ct_is_in_hounsfield_units():
    image, label_map = draw_case(np.random.default_rng(0), SHAPE, SPACING_MM, "ct")
    assert np.median(image[:3]) == pytest.approx(-1000, abs=10)
    assert np.median(image[label_map == 1]) == pytest.approx(105, abs=20)
    assert np.median(image[label_map == 2]) > np.median(image[label_map == 1]) + 15
    assert np.median(image[label_map == 3]) < np.median(image[label_map == 1]) - 15
    assert image.max() > 300, "bone"


def test_mr_scales_differ_between_cases():
    scales = [np.percentile(draw_case(np.random.default_rng(s), SHAPE, SPACING_MM, "mr")[0], 99) for s in range(6)]
    assert max(scales) / min(scales) > 50


def test_anatomy_does_not_depend_on_the_grid():
    """The same seed at twice the resolution shows the same body: geometry is in mm."""
    _, coarse = draw_case(np.random.default_rng(1), (48, 48, 24), (1.8, 1.8, 3.0), "ct")
    _, fine = draw_case(np.random.default_rng(1), (96, 96, 48), (0.9, 0.9, 1.5), "ct")
    middle = sum((fine[i::2, j::2, k::2] == 1).astype(int) for i in (0, 1) for j in (0, 1) for k in (0, 1)) >= 4
    both = 2 * (middle & (coarse == 1)).sum() / (middle.sum() + (coarse == 1).sum())
    assert both > 0.95


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 200, 1), (5, 7, 400)])
def test_any_shape(shape):
    image, label_map = draw_case(np.random.default_rng(0), shape, (1.0, 1.0, 1.0), "mr")
    assert image.shape == label_map.shape == shape
    assert np.isfinite(image).all()


def test_slabs_join_without_a_seam(monkeypatch):
    whole = draw_case(np.random.default_rng(5), SHAPE, SPACING_MM, "ct")[1]
    monkeypatch.setattr("medseg_diff.datasets.phantom.SLAB_VOXELS", 48 * 48 * 3)
    np.testing.assert_array_equal(draw_case(np.random.default_rng(5), SHAPE, SPACING_MM, "ct")[1], whole)


def test_the_set_is_readable_and_varied(phantom):
    assert phantom.labels == {0: "background", 1: "organ", 2: "vessel", 3: "lesion"}
    assert (phantom.modality, len(phantom.cases)) == ("CT", 5)
    images = [nib.load(case.image) for case in phantom.cases]
    assert [nib.aff2axcodes(image.affine) for image in images] == [tuple(order) for order, _ in GRIDS]
    assert len({np.asarray(nib.load(case.labels[0]).dataobj).sum() for case in phantom.cases}) == 5, "five bodies"
    assert any(np.abs(nib.affines.obliquity(image.affine)).max() > 0.05 for image in images)
    assert any(max(image.header.get_zooms()) > 1.5 * min(image.header.get_zooms()) for image in images)
    for case, image in zip(phantom.cases, images, strict=True):
        drawn = nib.load(case.labels[0])
        assert (image.get_data_dtype(), drawn.get_data_dtype()) == (np.int16, np.uint8)
        for header in (image.header, drawn.header):
            assert (header["qform_code"], header["sform_code"]) == (1, 1)
            assert header.get_xyzt_units()[0] == "mm"
        np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)
        np.testing.assert_array_equal(drawn.affine, image.affine)
        assert drawn.shape == image.shape


def test_axis_order_moves_no_voxel(phantom):
    """In world axes the organ lies to the right and the spine behind, whatever the order of the file's axes."""
    for case in phantom.cases:
        image, drawn = nib.load(case.image), nib.load(case.labels[0])
        place = nib.affines.apply_affine(image.affine, np.argwhere(np.asarray(drawn.dataobj) == 1)).mean(0)
        bone = nib.affines.apply_affine(image.affine, np.argwhere(np.asarray(image.dataobj) > 250)).mean(0)
        assert place[0] > bone[0] + 3
        assert place[1] > bone[1] + 3


def test_case_depends_on_seed_and_index_alone(phantom, tmp_path):
    make_phantom(tmp_path / "fewer", cases=2, modality="ct", raters=1, seed=3)
    make_phantom(tmp_path / "other", cases=1, modality="ct", raters=1, seed=4)
    for path in ("imagesTr/phantom_001.nii.gz", "labelsTr/phantom_001.nii.gz"):
        assert filecmp.cmp(tmp_path / "fewer" / path, phantom.root / path, shallow=False)
    name = "imagesTr/phantom_000.nii.gz"
    assert not filecmp.cmp(tmp_path / "other" / name, phantom.root / name, shallow=False)


def test_raters_differ_at_the_border_only(tmp_path):
    make_phantom(tmp_path / "p", cases=1, modality="mr", raters=3, seed=0)
    make_phantom(tmp_path / "q", cases=1, modality="mr", raters=1, seed=0)
    case = read_dataset(tmp_path / "p").cases[0]
    assert filecmp.cmp(case.image, tmp_path / "q/imagesTr/phantom_000.nii.gz", shallow=False)
    maps = [np.asarray(nib.load(path).dataobj) == 1 for path in case.labels]
    assert len(maps) == 3
    for a, b in ((0, 1), (0, 2), (1, 2)):
        dice = 2 * (maps[a] & maps[b]).sum() / (maps[a].sum() + maps[b].sum())
        assert 0.75 < dice < 0.99
    assert json.loads((tmp_path / "p/dataset.json").read_text())["training"][0]["label"] == [
        f"./labelsTr/phantom_000_rater{r}.nii.gz" for r in (1, 2, 3)
    ]


def test_a_full_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not empty"):
        make_phantom(tmp_path, cases=1, modality="ct", raters=1, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="not empty"):
        make_phantom(tmp_path / "thesis.txt", cases=1, modality="ct", raters=1, seed=0)


def test_an_interrupted_set_leaves_nothing_behind(tmp_path, monkeypatch):
    folder = tmp_path / "set"
    folder.mkdir()
    written = []

    def interrupt(*arguments):
        written.append(arguments)
        if len(written) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("medseg_diff.datasets.phantom.write_volume", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make_phantom(folder, cases=2, modality="ct", raters=1, seed=0)
    assert list(tmp_path.iterdir()) == [folder]
    assert list(folder.iterdir()) == []
    make_phantom(folder, cases=1, modality="ct", raters=1, seed=0)
    assert len(read_dataset(folder).cases) == 1
    assert list(tmp_path.iterdir()) == [folder]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/set: it cannot be written \(Not a directory\)"):
        make_phantom(tmp_path / "file/set", cases=1, modality="ct", raters=1, seed=0)


def test_distances_are_in_mm():
    points = np.array([[10, 0, 0], [0, 0, 0], [0, 0, 7], [4, 3, 0]], np.float32).T.reshape(3, 4, 1, 1)
    ball = Ellipsoid(np.zeros(3), np.full(3, 5.0))
    np.testing.assert_allclose(signed_distance(ball, points).ravel(), [5, -5, 2, 0], atol=1e-2)
    cylinder = Ellipsoid(np.zeros(3), np.array([5.0, 5.0, np.inf]))
    np.testing.assert_allclose(signed_distance(cylinder, points).ravel()[[0, 2, 3]], [5, -5, 0], atol=1e-2)
    tube = Tube(np.array([0.0, 0, 0]), np.array([8.0, 0, 0]), 1.0, 2.0)
    np.testing.assert_allclose(signed_distance(tube, points).ravel(), [0, -1, 6, 1.5], atol=1e-5)


def test_vessels_reach_every_end_and_obey_murray():
    ends = np.random.default_rng(0).normal(size=(9, 3)) * 10
    tree = grow_vessels(np.zeros(3), ends, radius=2.0)
    assert {tuple(end) for end in ends} <= {tuple(tube.end) for tube in tree}
    for parent in tree:
        children = [tube for tube in tree if (tube.start == parent.end).all()]
        if children:
            assert sum(c.start_radius**3 for c in children) == pytest.approx(parent.end_radius**3)
