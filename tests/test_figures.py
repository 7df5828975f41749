import numpy as np
import pytest
import torch
from matplotlib.image import imread

from medseg_diff.figures import Panel, colours, draw_curves, draw_grid, draw_lines, draw_strip

IMAGES = torch.randn(5, 16, 24, generator=torch.Generator().manual_seed(0))
CURVES = {"train/loss": ([0, 20, 40], [3.0, 2.0, 1.0]), "val/dice": ([40], [0.8]), "val/loss": ([], [])}
PANELS = [[("scan", np.eye(8)), ("mask", np.ones((8, 8, 3)))]] * 2
STEPS = {"ddim": ([1, 2, 4], [1.0, 0.5, 0.2]), "dpm++": ([1, 2, 4], [0.5, 0.2, 0.1])}
LINES = [Panel("all", "steps", "error", STEPS, log="xy"), Panel("one", "t", "y", {}, {"ddim": STEPS["ddim"]})]

DRAWINGS = {
    "curves": lambda path: draw_curves(CURVES, path),
    "no curves": lambda path: draw_curves({}, path),
    "strip": lambda path: draw_strip(PANELS, 2.0, path),
    "grid": lambda path: draw_grid(IMAGES, path),
    "volumes": lambda path: draw_grid(IMAGES[..., None].expand(-1, -1, -1, 4), path),
    "lines": lambda path: draw_lines(LINES, path, solid="one", dashed="other"),
    "one flat image": lambda path: draw_grid(torch.zeros(1, 16, 16), path),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_the_same_content_gives_the_same_bytes(name, tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        DRAWINGS[name](path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert len(list(tmp_path.iterdir())) == 2
    assert imread(paths[0]).ndim == 3


def test_other_content_gives_another_picture(tmp_path):
    draw_grid(IMAGES, tmp_path / "a.png")
    draw_grid(IMAGES.flip(0), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_a_soft_mask_mixes_its_colours():
    probability = np.zeros((3, 1, 3))
    probability[:, 0, :] = np.array([[1, 0, 0], [0, 1, 0], [0.5, 0.5, 0]]).T
    background, label, mixture = colours(probability)[0]
    assert background.tolist() == [0, 0, 0]
    assert mixture.tolist() == pytest.approx((label / 2).tolist())
    assert label.max() > 0.5


def test_more_labels_than_colours():
    assert colours(np.eye(20)[:, None]).shape == (1, 20, 3)


def test_a_name_has_its_colour_in_every_panel_and_colours_are_many(tmp_path):
    """A panel that lacks the first name draws the second in the second's colour."""
    both = Panel("", "", "", {"a": ([0, 1], [0, 1]), "b": ([0, 1], [1, 0])})
    draw_lines([both, Panel("", "", "", {"b": ([0, 1], [1, 0])})], tmp_path / "a.png")
    right = imread(tmp_path / "a.png")[:, 600:1150, :3]
    assert (abs(right - np.array([204, 121, 167]) / 255).max(-1) < 0.01).sum() > 500
    draw_lines([Panel("", "", "", {str(i): ([0, 1], [0, i]) for i in range(20)})], tmp_path / "b.png")
