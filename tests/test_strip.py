"""The process on one image: what is read, what is drawn, and the laws that the pictures show."""

import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from PIL import Image

from medseg_diff import cli
from medseg_diff.diffusion.schedule import levels
from medseg_diff.errors import UserError
from medseg_diff.strip import draw_diffusion, forward, read_picture, reverse

OPTIONS = {"size": 32, "schedule": "cosine", "steps": 12, "shown": 4, "seed": 0}


def ramp(height: int = 32, width: int = 48) -> np.ndarray:
    return np.tile(np.linspace(0, 255, width), (height, 1)).astype(np.uint8)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(ramp()).save(tmp_path / "ramp.png")
    return tmp_path / "ramp.png"


def image(kind: str, folder: Path) -> Path:
    path = folder / f"a.{kind}"
    if kind == "nii.gz":
        volume = np.repeat(ramp().T[..., None].astype(np.float32), 5, 2) * 7 - 1000
        nib.save(nib.Nifti1Image(volume, np.diag([1, 1, 4, 1])), path)
    elif kind == "tif":
        Image.fromarray(ramp().astype(np.uint16) * 16).save(path)
    else:
        Image.fromarray(ramp()).convert("RGB").save(path)
    return path


@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "nii.gz"])
def test_every_kind_of_image_is_drawn(kind, tmp_path, monkeypatch, capsys):
    path = image(kind, tmp_path)
    options = ["--size", "32", "--steps", "20", "--shown", "3", "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["medseg-diff", "diffusion", str(path), *map(str, options)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    printed = capsys.readouterr().out.splitlines()
    written = [tmp_path / "out" / name for name in ("forward.png", "forward.gif", "reverse.png", "reverse.gif")]
    assert printed[:4] == [str(path) for path in written]
    assert float(printed[4].split()[-1]) < 1e-12
    for path, columns, rows in zip(written, (3, 1, 3, 2), (2, 1, 3, 1), strict=True):
        with Image.open(path) as drawn:
            side = 192 if path.suffix == ".png" else 256
            assert 0 < drawn.width - columns * side < 80
            assert 0 < drawn.height - rows * side < 190
            assert getattr(drawn, "n_frames", 1) == (21 if path.suffix == ".gif" else 1)
            assert path.stat().st_size < 1e6


def test_the_first_column_is_the_image_and_the_last_of_the_way_back_too(picture, tmp_path):
    (there, _, back, _), _ = draw_diffusion(picture, tmp_path, **OPTIONS)
    expected = np.array(Image.fromarray(read_picture(picture, 32)).resize((192, 192), Image.Resampling.NEAREST)) / 255
    forth, back = imread(there)[..., 0], imread(back)[..., 0]
    left = forth.shape[1] - 4 * 198
    assert forth[-198:-6, left : left + 192] == pytest.approx(expected, abs=0.01)
    assert back[-198 * 3 : -198 * 3 + 192, -198:-6] == pytest.approx(expected, abs=0.01)
    assert abs(forth[-198:-6, -198:-6] - expected).mean() > 0.2


def test_the_same_seed_gives_the_same_bytes(picture, tmp_path):
    first, again, other = (
        [path.read_bytes() for path in draw_diffusion(picture, tmp_path / name, **OPTIONS | {"seed": seed})[0]]
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert first == again
    assert all(one != two for one, two in zip(first, other, strict=True))


@pytest.mark.parametrize("times", [range(101), [0, 30, 31, 100], [0, 100]])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_forward_ends_in_noise_however_the_noises_are_merged(schedule, times):
    x_0 = torch.linspace(-1, 1, 128**2, dtype=torch.float64).reshape(1, 128, 128)
    alpha_bars = levels(schedule, 100).flip(0)
    states = list(forward(x_0, alpha_bars, list(times), torch.Generator().manual_seed(0)))
    assert len(states) == len(times)
    assert all(torch.allclose(chain, closed, rtol=0, atol=1e-12) for chain, closed in states)
    assert torch.equal(states[0][0], x_0)
    noise = states[-1][0]
    assert float(noise.mean()) == pytest.approx(0, abs=0.03)
    assert float(noise.std()) == pytest.approx(1, abs=0.02)
    middle = states[len(times) // 2][0] - alpha_bars[list(times)[len(times) // 2]].sqrt() * x_0
    assert float(middle.std()) == pytest.approx(float((1 - alpha_bars[list(times)[len(times) // 2]]).sqrt()), abs=0.02)


def test_reverse_ends_in_the_image_and_has_the_levels_noise_on_the_way():
    x_0 = torch.linspace(-1, 1, 128**2, dtype=torch.float64).reshape(1, 128, 128)
    path = levels("cosine", 50)
    states = list(reverse(x_0, path, torch.Generator().manual_seed(0)))
    assert len(states) == 51
    assert torch.equal(states[-1], x_0)
    for x_t, alpha_bar in zip(states, path, strict=True):
        noise = x_t - alpha_bar.sqrt() * x_0
        assert float(noise.mean()) == pytest.approx(0, abs=0.03)
        assert float(noise.std()) == pytest.approx(float((1 - alpha_bar).sqrt()), abs=0.02)


def test_a_picture_keeps_its_proportions(picture):
    square = read_picture(picture, 48)
    assert not square[:8].any()
    assert not square[-8:].any()
    assert square[24] == pytest.approx(ramp()[0], abs=3)


def test_a_scan_shows_its_middle_slice_stretched_and_in_millimetres(tmp_path):
    """Voxels are twice as tall as wide, and of three slices only the middle one has a bright left half."""
    volume = np.zeros((40, 20, 3), np.float32)
    volume[:20, :, 1] = 3000
    nib.save(nib.Nifti1Image(volume, np.diag([-1, 2, 5, 1])), tmp_path / "a.nii")
    square = read_picture(tmp_path / "a.nii", 40)
    assert (square[:, :18] == 255).all() != (square[:, 22:] == 255).all()
    assert sorted({int(value) for value in square[:, [5, 35]].ravel()}) == [0, 255]


def test_sixteen_bits_are_stretched_and_an_image_of_one_value_is_black(tmp_path):
    Image.fromarray(ramp(32, 32).astype(np.uint16) * 100 + 7000).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png", 32)[0] == pytest.approx(ramp(32, 32)[0], abs=3)
    Image.fromarray(np.full((8, 8), 900, np.uint16)).save(tmp_path / "b.png")
    assert not read_picture(tmp_path / "b.png", 16).any()


def test_a_photograph_stands_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(ramp(48, 48)).save(tmp_path / "a.jpg", exif=exif)
    assert read_picture(tmp_path / "a.jpg", 48)[:, 0] == pytest.approx(ramp(48, 48)[0], abs=6)


def bad(name: str, folder: Path, whole: bytes) -> Path:
    contents = {
        "text.png": b"no image",
        "cut.png": whole[: len(whole) // 2],
        "scan.nii": b"no scan",
        "list.csv": b"1,2",
    }
    path = folder / name
    if name in contents:
        path.write_bytes(contents[name])
    elif name in ("large.png", "huge.png"):
        Image.new("1", (10_000, 10_000 if name == "large.png" else 20_000)).save(path)
    return path


@pytest.mark.parametrize("name", ["absent.png", "text.png", "cut.png", "scan.nii", "list.csv", "large.png", "huge.png"])
def test_what_is_no_image_is_refused(name, picture, tmp_path):
    with pytest.raises(UserError) as refused:
        draw_diffusion(bad(name, tmp_path, picture.read_bytes()), tmp_path / "out", **OPTIONS)
    assert name in refused.value.where
    assert ("pixels" in refused.value.what) == (name in ("large.png", "huge.png"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"shown": 8, "steps": 7}, {"schedule": "square"}])
def test_options_that_do_not_fit_are_refused(change, picture, tmp_path):
    with pytest.raises(UserError, match=f"--{next(iter(change))} {next(iter(change.values()))}"):
        draw_diffusion(picture, tmp_path / "out", **OPTIONS | change)


def test_a_place_that_cannot_be_written_to_is_refused(picture):
    with pytest.raises(UserError, match="cannot be written"):
        draw_diffusion(picture, picture / "out", **OPTIONS)
