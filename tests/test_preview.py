from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from medseg_diff.scans.preview import View, choose_view, draw_preview
from medseg_diff.scans.read import read_label_map, read_scan
from medseg_diff.scans.write import label_colors

NAMES = {0: "background", 1: "Anterior", 2: "Posterior"}
ISOTROPIC = np.eye(4)


def ball(shape: tuple[int, int, int], center: tuple[int, int, int], radius: float) -> np.ndarray:
    grid = np.indices(shape)
    return (sum((grid[i] - center[i]) ** 2 for i in range(3)) < radius**2).astype(np.uint8)


def draw(
    path: Path, shape=(40, 50, 30), labels=None, uncertainty=None, affine=ISOTROPIC, names=NAMES, title="knee"
) -> np.ndarray:
    """The picture's pixels, of an image of noise."""
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    labels = np.zeros(shape, np.uint8) if labels is None else labels
    draw_preview(image, labels, uncertainty, affine, names, path, title)
    return imread(path)[:, :, :3]


def count(picture: np.ndarray, color: str) -> int:
    return int((np.abs(picture - to_rgb(color)).max(-1) < 0.02).sum())


def test_each_label_is_drawn_in_its_colour(tmp_path):
    labels = ball((40, 50, 30), (12, 20, 15), 6) + 2 * ball((40, 50, 30), (28, 20, 15), 6)
    colors = label_colors(NAMES)
    both, one = draw(tmp_path / "a.png", labels=labels), draw(tmp_path / "b.png", labels=labels % 2)
    legend = draw(tmp_path / "c.png")
    for value in (1, 2):
        assert count(both, colors[value]) > count(legend, colors[value]) + 500
    assert count(one, colors[2]) < count(both, colors[2]) - 500


def test_uncertainty_stands_below(tmp_path):
    labels = ball((40, 50, 30), (20, 20, 15), 6)
    sure = np.zeros((40, 50, 30), np.float32)
    alone, calm = draw(tmp_path / "a.png", labels=labels), draw(tmp_path / "b.png", labels=labels, uncertainty=sure)
    hot = draw(tmp_path / "c.png", labels=labels, uncertainty=sure + 0.5)
    assert calm.shape[0] > 1.7 * alone.shape[0]
    lower = slice(calm.shape[0] * 2 // 3, None), slice(0, calm.shape[1] // 2)
    assert calm[lower].mean() < 0.1
    assert hot[lower].mean() > 0.7


def test_the_window_shows_contrast_around_the_organ(tmp_path):
    """A lesion of 60 HU in an organ of 40 HU is seen beside air of -1000 HU."""
    shape = (60, 60, 9)
    image = np.full(shape, -1000, np.float32)
    image[10:50, 10:50] = 40 + np.random.default_rng(0).normal(0, 5, (40, 40, 9))
    image[25:35, 25:35] += 60
    labels = np.zeros(shape, np.uint8)
    labels[15:45, 15:45] = 1
    draw_preview(image, labels, None, np.diag([1, 1, 3.0, 1]), NAMES, tmp_path / "a.png", "ct")
    panel = imread(tmp_path / "a.png")[100:-20, 20:400, 0]
    height, width = panel.shape
    lesion = panel[height // 2 - 10 : height // 2 + 10, width // 2 - 10 : width // 2 + 10].mean()
    organ = panel[height // 2 - 10 : height // 2 + 10, width // 3 - 10 : width // 3 + 10].mean()
    assert lesion - organ > 0.2


def test_the_same_content_gives_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        draw(tmp_path / name, labels=ball((40, 50, 30), (20, 20, 15), 6))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("shape", [(3, 3, 3), (40, 50, 1), (1, 1, 1), (2, 300, 2), (512, 512, 4)])
def test_odd_shapes_and_empty_masks_are_drawn_in_bounds(tmp_path, shape, full):
    labels = np.full(shape, full, np.uint8)
    picture = draw(tmp_path / "a.png", shape, labels, np.full(shape, 0.2, np.float32))
    height, width = picture.shape[:2]
    assert 300 < width <= 1640
    assert 300 < height <= 1640
    assert picture.std() > 0.01


def test_constant_images_and_strange_names_are_drawn(tmp_path):
    names = {0: "background"} | {value: f"$label_{{{value}}}$ 海馬 " + "x" * 50 for value in range(1, 30)}
    labels = np.arange(30, dtype=np.uint8).repeat(27).reshape(30, 3, 9)
    draw_preview(np.ones((30, 3, 9), np.float32), labels, None, ISOTROPIC, names, tmp_path / "a.png", "$t_{$" * 100)
    assert imread(tmp_path / "a.png").std() > 0.01


def orientations() -> list[np.ndarray]:
    return [nib.orientations.axcodes2ornt(codes) for codes in ("RAS", "LPS", "SAR", "PIL", "IRA", "ASL")]


@pytest.mark.parametrize("target", orientations())
@pytest.mark.parametrize(
    ("axis", "corner"),
    [(2, "the patient's right and front at the top left"), (1, "right and superior"), (0, "front and superior")],
)
def test_pictures_are_radiological_however_the_file_is_turned(target, axis, corner):
    shape = (9, 9, 9)
    marked = np.zeros(shape, np.uint8)
    # The last voxel of an RAS volume is the patient's right, front and top.
    marked[-1, -1, -1] = 1
    image = nib.Nifti1Image(marked, ISOTROPIC)
    turned = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(ISOTROPIC), target))
    view = View(nib.io_orientation(turned.affine), axis, [8], 9, (slice(None), slice(None)), (1.0, 1.0))
    assert view.cut(np.asarray(turned.dataobj), 8)[0, 0] == 1, corner


def test_the_acquired_plane_is_shown_with_its_true_pixels():
    affine = np.array([[0, 0, 4.0, 0], [0.5, 0, 0, 0], [0, 0.8, 0, 0], [0, 0, 0, 1]])  # x along A, y along S, z along R
    labels = np.zeros((40, 30, 12), np.uint8)
    labels[15:25, 12:18, 3:9] = 1
    view = choose_view(labels, None, affine)
    assert view.axis == 0
    assert view.count == 12
    assert view.pixel_mm == (0.5, 0.8)
    assert view.slices == [3, 5, 7]


def test_without_foreground_the_slices_follow_the_uncertainty_then_the_volume():
    empty = np.zeros((20, 20, 60), np.uint8)
    uncertainty = np.zeros(empty.shape, np.float32)
    uncertainty[5:15, 5:15, 40:47] = 0.3
    affine = np.diag([1, 1, 3.0, 1])
    assert choose_view(empty, uncertainty, affine).slices == [41, 43, 45]
    assert choose_view(empty, None, affine).slices == [9, 29, 49]


def test_a_small_structure_is_shown_large():
    labels = ball((200, 200, 20), (60, 150, 10), 10)
    view = choose_view(labels, None, np.diag([1, 1, 3.0, 1]))
    assert [(s.start, s.stop) for s in view.box] == [(32, 89), (122, 179)]


def test_a_real_case_is_drawn(tmp_path, hippocampus):
    path = sorted((hippocampus / "imagesTr").glob("*.nii.gz"))[0]
    scan, (labels, _) = read_scan(path), read_label_map(hippocampus / "labelsTr" / path.name)
    draw_preview(scan.array[0], labels, None, scan.affine, NAMES, tmp_path / "a.png", scan.name)
    assert count(imread(tmp_path / "a.png")[:, :, :3], label_colors(NAMES)[1]) > 1000
