import math

import pytest
import torch

from medseg_diff.datasets import augment as module
from medseg_diff.datasets.augment import augment, margin_of

STRENGTHS = ("ROTATION", "SCALE", "SHIFT", "GAIN", "OFFSET", "NOISE")
SIZES = [(32, 48), (16, 32, 16)]


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch):
    """Sets all strengths to zero but those that are given."""

    def choose(**strengths: float) -> None:
        for name in STRENGTHS:
            monkeypatch.setattr(module, name, strengths.get(name, 0.0))

    return choose


def drawn(size: tuple[int, ...]) -> tuple[int, ...]:
    """A training size with its margin."""
    return tuple(length + 2 * margin for length, margin in zip(size, margin_of(size), strict=True))


def middle(x: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """What is left where nothing is augmented."""
    for axis, length in enumerate(size, start=x.ndim - len(size)):
        x = x.narrow(axis, (x.shape[axis] - length) // 2, length)
    return x


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ball(
    shape: tuple[int, ...], spacing_mm: tuple[float, ...], radius_mm: float, centre_mm: tuple[float, ...]
) -> torch.Tensor:
    axes = [(torch.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing_mm, strict=True)]
    positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1) - torch.tensor(centre_mm)
    return positions.norm(dim=-1) <= radius_mm


def dice(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


@pytest.mark.parametrize("size", SIZES)
def test_nothing_happens_where_all_strengths_are_zero(size: tuple[int, ...], only):
    only()
    space = drawn(size)
    image, labels = torch.randn(3, 2, *space), torch.randint(0, 4, (3, *space))
    found, found_labels = augment(image, labels, size, (1.0,) * len(size), generator())
    assert found.shape == (3, 2, *size)
    torch.testing.assert_close(found, middle(image, size), atol=1e-4, rtol=0)
    assert torch.equal(found_labels, middle(labels, size))
    assert found_labels.dtype == torch.int64


def test_the_margin_is_an_eighth_on_either_side():
    assert margin_of((32, 48, 16)) == (4, 6, 2)
    assert margin_of((20,)) == (3,)


@pytest.mark.parametrize("size", SIZES)
def test_a_bright_ball_stays_labelled(size: tuple[int, ...]):
    space, dims = drawn(size), len(size)
    shape = ball(space, (1.0,) * dims, min(size) / 2.5, (1.5, -2.0, 1.0)[:dims])
    image = shape.float().expand(8, 1, *space).clone()
    found, labels = augment(image * 10, shape.long().expand(8, *space), size, (1.0,) * dims, generator())
    for one, label in zip(found, labels, strict=True):
        bright = one[0] > (one[0].min() + one[0].max()) / 2
        assert dice(bright, label == 1) > 0.95
    moved = [dice(label == 1, middle(shape, size)) for label in labels]
    assert min(moved) < 0.95  # it did not stand still


@pytest.mark.parametrize(("size", "spacing_mm"), [((64, 32), (1.0, 3.0)), ((48, 48, 16), (1.0, 1.0, 4.0))])
def test_rotation_is_one_of_millimetres(size: tuple[int, ...], spacing_mm: tuple[float, ...], only):
    only(ROTATION=math.radians(40))
    space = drawn(size)
    sphere = ball(space, spacing_mm, 20, (0.0,) * len(size))
    _, labels = augment(torch.zeros(6, 1, *space), sphere.long().expand(6, *space), size, spacing_mm, generator())
    for label in labels:
        assert dice(label == 1, middle(sphere, size)) > 0.95
    # what is no sphere in mm does change
    _, labels = augment(
        torch.zeros(6, 1, *space), sphere.long().expand(6, *space), size, (1.0,) * len(size), generator()
    )
    assert min(dice(label == 1, middle(sphere, size)) for label in labels) < 0.9


def test_scale_and_shift_stay_within_their_bounds(only):
    size = (64, 64)
    space = drawn(size)
    disc = ball(space, (1.0, 1.0), 14, (0.0, 0.0)).long().expand(40, *space)
    only(SCALE=0.15)
    _, labels = augment(torch.zeros(40, 1, *space), disc, size, (1.0, 1.0), generator())
    ratios = (labels.flatten(1).sum(1) / disc[0].sum()).sqrt()
    assert (ratios > 0.95 * math.exp(-0.15)).all()
    assert (ratios < 1.05 * math.exp(0.15)).all()
    assert ratios.max() - ratios.min() > 0.2
    only(SHIFT=0.06)
    _, labels = augment(torch.zeros(40, 1, *space), disc, size, (1.0, 1.0), generator())
    places = torch.stack([(label == 1).nonzero().float().mean(0) - 31.5 for label in labels])
    assert places.abs().max() < 0.06 * 64 + 0.6
    assert places.abs().amax(0).min() > 2


def test_intensities_change_alike_in_all_channels(only):
    only(GAIN=0.25, OFFSET=0.3)
    image = torch.randn(20, 2, 40, 40)
    found, _ = augment(image, torch.zeros(20, 40, 40), (32, 32), (1.0, 1.0), generator())
    plain = middle(image, (32, 32))
    offsets = []
    for before, after in zip(plain.flatten(1), found.flatten(1), strict=True):
        slope = float((after[0] - after[1]) / (before[0] - before[1]))
        assert math.exp(-0.25) - 1e-3 <= slope <= math.exp(0.25) + 1e-3
        offset = float((after - slope * before).mean())
        assert abs(offset) <= 0.301
        torch.testing.assert_close(after, slope * before + offset, atol=1e-2, rtol=0)
        offsets.append(offset)
    assert max(offsets) - min(offsets) > 0.3
    only(NOISE=0.05)
    noise = augment(image, torch.zeros(20, 40, 40), (32, 32), (1.0, 1.0), generator())[0] - plain
    assert float(noise.std()) == pytest.approx(0.05, rel=0.05)


def test_the_same_generator_the_same_batch_and_every_item_its_own():
    image, labels = torch.randn(1, 1, 40, 40).expand(4, -1, -1, -1), torch.randint(0, 3, (1, 40, 40)).expand(4, -1, -1)
    first = augment(image, labels, (32, 32), (1.0, 1.0), generator(3))
    again = augment(image, labels, (32, 32), (1.0, 1.0), generator(3))
    other = augment(image, labels, (32, 32), (1.0, 1.0), generator(4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    for i in range(4):
        for j in range(i):
            assert not torch.equal(first[1][i], first[1][j])


def test_the_seed_of_the_program_is_not_touched():
    state = torch.get_rng_state()
    augment(torch.zeros(1, 1, 40, 40), torch.zeros(1, 40, 40), (32, 32), (1.0, 1.0), generator())
    assert torch.equal(torch.get_rng_state(), state)
