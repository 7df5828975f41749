import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image

from medseg_diff.figures import (
    FRAMES,
    Panel,
    colours,
    draw_curves,
    draw_film,
    draw_gif,
    draw_grid,
    draw_lines,
    draw_process,
    draw_strip,
)

IMAGES = torch.randn(5, 16, 24, generator=torch.Generator().manual_seed(0))
CURVES = {"train/loss": ([0, 20, 40], [3.0, 2.0, 1.0]), "val/dice": ([40], [0.8]), "val/loss": ([], [])}
PANELS = [[("scan", np.eye(8)), ("mask", np.ones((8, 8, 3)))]] * 2
STEPS = {"ddim": ([1, 2, 4], [1.0, 0.5, 0.2]), "dpm++": ([1, 2, 4], [0.5, 0.2, 0.1])}
LINES = [Panel("all", "steps", "error", STEPS, log="xy"), Panel("one", "t", "y", {}, {"ddim": STEPS["ddim"]})]
GRAYS = np.linspace(-1, 1, 51)
STATES = [
    (f"$t$ = {i}\nlevel", {"x_t": np.stack([np.full((5, 9), gray), np.full((5, 9), -gray)])})
    for i, gray in enumerate(GRAYS)
]

DRAWINGS = {
    "curves": lambda path: draw_curves(CURVES, path),
    "no curves": lambda path: draw_curves({}, path),
    "strip": lambda path: draw_strip(PANELS, 2.0, path),
    "grid": lambda path: draw_grid(IMAGES, path),
    "volumes": lambda path: draw_grid(IMAGES[..., None].expand(-1, -1, -1, 4), path),
    "lines": lambda path: draw_lines(LINES, path, solid="one", dashed="other"),
    "process": lambda path: draw_process(STATES, path, title="a title"),
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


def test_a_figure_of_a_process_has_a_column_a_state_and_a_row_a_picture(tmp_path):
    """The pictures lie at the lower right edge, 30 times 5 x 9 pixels each, 6 pixels apart."""
    draw_process(STATES, tmp_path / "a.png", shown=3)
    picture = imread(tmp_path / "a.png")[..., 0]
    centres = picture[[-80, -80 - 156], :][:, [-140 - 276 * 2, -140 - 276, -140]]
    assert centres == pytest.approx(np.array([[1, 0.5, 0], [0, 0.5, 1]]), abs=0.01)
    draw_process(STATES, tmp_path / "b.png", shown=3, aspect=2.0)
    height, width = imread(tmp_path / "b.png").shape[:2]
    assert height > picture.shape[0] + 100
    assert width < picture.shape[1] - 200


def test_a_process_may_be_flat(tmp_path):
    with np.errstate(all="raise"):
        draw_process(STATES[:1], tmp_path / "a.png", limits=(-1.0, -1.0))
    assert imread(tmp_path / "a.png")[-80, -140, 0] == 1  # the second image, 1, above the only value shown


def test_a_film_goes_from_the_first_state_to_the_last_and_ends_held(tmp_path):
    paths = [tmp_path / "a.gif", tmp_path / "b.gif"]
    for path in paths:
        draw_film(STATES, path, seconds=3.1)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with Image.open(paths[0]) as film:
        assert film.n_frames == FRAMES < len(STATES)
        assert film.info["loop"] == 0
        grays, durations_ms = [], []
        for index in range(FRAMES):
            film.seek(index)
            grays.append(film.convert("L").getpixel((film.width // 2, film.height - 60)))
            durations_ms.append(film.info["duration"])
    assert grays[0] > 245
    assert grays[-1] < 10
    assert grays == sorted(grays, reverse=True)
    assert durations_ms == [100] * (FRAMES - 1) + [2100]


def test_a_gif_keeps_few_colours_as_they_are(tmp_path):
    frames = [np.zeros((4, 6, 3), np.uint8), np.full((4, 6, 3), (230, 159, 0), np.uint8)]
    draw_gif(frames, tmp_path / "a.gif", seconds=1.0)
    with Image.open(tmp_path / "a.gif") as film:
        for index, frame in enumerate(frames):
            film.seek(index)
            assert np.asarray(film.convert("RGB")).tolist() == frame.tolist()


def test_colours_do_not_tint_the_grays_of_a_gif(tmp_path):
    ramp = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    brown = np.stack([ramp // 2, ramp // 3, 0 * ramp], -1)
    frame = np.concatenate([np.stack([ramp] * 3, -1), *[brown] * 9])
    draw_gif([frame, frame[:, ::-1].copy()], tmp_path / "a.gif", seconds=1.0)
    with Image.open(tmp_path / "a.gif") as film:
        shown = np.asarray(film.convert("RGB")).astype(int)
    assert (np.ptp(shown[:4, 32:], axis=-1) == 0).all()
    assert abs(shown - frame).max() < 16


def test_a_name_has_its_colour_in_every_panel_and_colours_are_many(tmp_path):
    """A panel that lacks the first name draws the second in the second's colour."""
    both = Panel("", "", "", {"a": ([0, 1], [0, 1]), "b": ([0, 1], [1, 0])})
    draw_lines([both, Panel("", "", "", {"b": ([0, 1], [1, 0])})], tmp_path / "a.png")
    right = imread(tmp_path / "a.png")[:, 600:1150, :3]
    assert (abs(right - np.array([204, 121, 167]) / 255).max(-1) < 0.01).sum() > 500
    draw_lines([Panel("", "", "", {str(i): ([0, 1], [0, i]) for i in range(20)})], tmp_path / "b.png")
