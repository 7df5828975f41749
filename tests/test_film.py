import numpy as np
import pytest
from matplotlib.image import imread
from PIL import Image

from medseg_diff.film import FRAMES, draw_film, draw_gif, draw_process

GRAYS = np.linspace(-1, 1, 51)
STATES = [
    (f"$t$ = {i}\nlevel", {"x_t": np.stack([np.full((5, 9), gray), np.full((5, 9), -gray)])})
    for i, gray in enumerate(GRAYS)
]


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


def test_the_same_states_give_the_same_bytes(tmp_path):
    for name in "ab":
        draw_process(STATES, tmp_path / f"{name}.png", title="a title")
        draw_film(STATES, tmp_path / f"{name}.gif")
    for suffix in ("png", "gif"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
