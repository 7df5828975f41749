import numpy as np
import pytest
import torch

from medseg_diff.datasets.cache import Volume
from medseg_diff.datasets.slices import cut, draw_batch, with_neighbours


def numbered(shape: tuple[int, int, int], marked: tuple[int, int, int] | None = None, raters: int = 1) -> Volume:
    """Every voxel holds its own number; the marked one is labelled."""
    image = torch.arange(1, 1 + int(np.prod(shape)), dtype=torch.float32).reshape(1, *shape)
    labels = torch.zeros(raters, *shape, dtype=torch.uint8)
    if marked is None:
        return Volume("a", image, labels, ())
    labels[:, *marked] = 1
    return Volume("a", image, labels, (np.array([marked]),))


def draw(
    volume: Volume,
    size: tuple[int, ...],
    count: int = 50,
    margin: int = 0,
    axis: int = 2,
    neighbours: int = 0,
    foreground: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    return draw_batch(
        [volume],
        np.random.default_rng(0),
        batch_size=count,
        size=size,
        margin=(margin,) * len(size),
        axis=axis,
        neighbours=neighbours,
        foreground=foreground,
    )


def test_neighbours_by_hand():
    volume = torch.tensor([[10.0, 20, 30, 40], [1, 2, 3, 4]]).reshape(2, 4, 1, 1)
    found = with_neighbours(volume, 1)[:, :, 0, 0].tolist()
    assert found == [
        [10, 10, 20, 1, 1, 2],
        [10, 20, 30, 1, 2, 3],
        [20, 30, 40, 2, 3, 4],
        [30, 40, 40, 3, 4, 4],
    ]
    assert with_neighbours(volume, 1, slice(2, 4))[:, :, 0, 0].tolist() == found[2:]
    assert with_neighbours(volume, 0)[:, :, 0, 0].tolist() == [[10, 1], [20, 2], [30, 3], [40, 4]]
    assert with_neighbours(volume[:, :1], 2)[:, :, 0, 0].tolist() == [[10] * 5 + [1] * 5]


@pytest.mark.parametrize("marked", [(0, 0, 0), (19, 17, 22), (10, 3, 15)])
def test_crops_of_volumes_hold_the_foreground_and_lie_inside(marked: tuple[int, int, int]):
    volume = numbered((20, 18, 23), marked)
    images, labels = draw(volume, (8, 6, 10))
    assert images.shape == (50, 1, 8, 6, 10)
    assert labels.shape == (50, 8, 6, 10)
    number = volume.image[0][marked]
    for image, label in zip(images, labels, strict=True):
        assert label.sum() == 1
        assert image[0][label == 1].item() == number
        assert (image > 0).all()
        steps = [image[0].diff(dim=k).unique().tolist() for k in range(3)]
        assert steps == [[18 * 23], [23], [1]]  # a box of the volume, in its order
    assert len(torch.unique(images[:, 0, 0, 0, 0])) > 1 or marked in {(0, 0, 0), (19, 17, 22)}


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_crops_of_slices_hold_the_foreground_across_every_axis(axis: int):
    marked = (10, 3, 15)
    volume = numbered((20, 18, 23), marked)
    images, labels = draw(volume, (8, 6), axis=axis, neighbours=1)
    assert images.shape == (50, 3, 8, 6)
    assert labels.shape == (50, 8, 6)
    strides = [18 * 23, 23, 1]
    for image, label in zip(images, labels, strict=True):
        assert label.sum() == 1
        below, middle, above = image[:, label == 1].flatten().tolist()
        assert middle == volume.image[0][marked]
        assert above - middle == middle - below == strides[axis]
        inside = [image[1].diff(dim=k).unique().tolist() for k in range(2)]
        assert inside == [[stride] for stride in np.delete(strides, axis)]


@pytest.mark.parametrize("size", [(8, 6), (8, 6, 10)])
def test_a_margin_is_drawn_around_the_same_crops_zeros_outside(size: tuple[int, ...]):
    volume = numbered((20, 18, 23), (0, 17, 22))
    narrow, narrow_labels = draw(volume, size, neighbours=1)
    wide, wide_labels = draw(volume, size, neighbours=1, margin=3)
    box = (..., *(slice(3, 3 + n) for n in size))
    assert wide_labels.shape == (50, *(n + 6 for n in size))
    assert torch.equal(wide[box], narrow)
    assert torch.equal(wide_labels[box], narrow_labels)
    assert (narrow > 0).all()
    assert not wide[:, :, :3].any()  # all crops touch this end of the volume
    assert wide[:, :, -3:].any()


def test_what_is_smaller_than_the_crop_stands_in_its_middle_among_zeros():
    volume = numbered((4, 6, 3), (1, 2, 1))
    images, labels = draw(volume, (8, 6, 6), count=2)
    middle = images[:, :, 2:6, :, 1:4]
    assert torch.equal(middle, volume.image.expand(2, -1, -1, -1, -1))
    assert images.sum() == middle.sum()
    assert torch.equal(labels.argmax(), torch.tensor(3 * 36 + 2 * 6 + 2))
    slices, _ = draw(volume, (8, 8), count=2, axis=2, neighbours=1)
    assert torch.equal(slices[0, :, 2:6, 1:7], volume.image[0].movedim(2, 0))
    assert torch.count_nonzero(slices[0]) == 3 * 24


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_of_crops_around_the_foreground(share: float):
    volume = numbered((64, 64, 64), (30, 30, 30))
    _, labels = draw(volume, (4, 4, 4), count=400, foreground=share)
    found = float((labels.flatten(1).sum(1) > 0).float().mean())
    assert found == pytest.approx(share, abs=0.07)


def test_without_foreground_every_part_is_drawn():
    images, labels = draw(numbered((6, 6, 6)), (2, 2, 2), count=2000)
    assert not labels.any()
    assert set(images.flatten().tolist()) == set(range(1, 217))


def test_every_class_every_rater_and_every_volume_is_drawn():
    rare, common = np.array([[1, 1, 1]]), np.argwhere(np.ones((8, 4, 8)))
    labels = torch.stack([torch.full((8, 8, 8), rater, dtype=torch.uint8) for rater in (1, 2, 3)])
    first = Volume("a", torch.zeros(1, 8, 8, 8), labels, (rare, common))
    second = Volume("b", torch.ones(1, 8, 8, 8), labels[:0], ())
    rng = np.random.default_rng(0)
    images, drawn = draw_batch(
        [first, second], rng, batch_size=120, size=(2, 2, 2), margin=(0, 0, 0), axis=2, neighbours=0, foreground=1.0
    )
    assert 40 < int(images[:, 0, 0, 0, 0].sum()) < 80
    counts = torch.bincount(drawn[:, 0, 0, 0], minlength=4).tolist()
    assert counts[0] == int(images[:, 0, 0, 0, 0].sum())  # the volume without labels is background
    assert min(counts[1:]) > 8

    marks = torch.zeros(1, 8, 8, 8, dtype=torch.uint8)
    marks[0, 1, 1, 1] = 1
    seen = draw_batch(
        [Volume("a", torch.zeros(1, 8, 8, 8), marks, (rare, common[common[:, 0] > 5]))], rng,
        batch_size=100, size=(2, 2, 2), margin=(0, 0, 0), axis=2, neighbours=0, foreground=1.0,
    )[1]  # fmt: skip
    assert 30 < int(seen.flatten(1).any(1).sum()) < 70  # as often as the class with many voxels


def test_the_same_seed_draws_the_same_batch():
    volume = numbered((20, 18, 23), (10, 3, 15))
    assert torch.equal(draw(volume, (8, 8), foreground=0.5)[0], draw(volume, (8, 8), foreground=0.5)[0])
    images, _ = draw(volume, (8, 8), foreground=0.0)
    assert len(torch.unique(images[:, 0, 0, 0])) > 20


def test_cut_is_a_box_of_the_last_dimensions():
    x = torch.arange(1, 13).reshape(1, 3, 4)
    assert cut(x, (1, 1), (2, 2)).tolist() == [[[6, 7], [10, 11]]]
    assert cut(x, (-1, 3), (2, 3)).tolist() == [[[0, 0, 0], [4, 0, 0]]]
    assert torch.equal(cut(x, (0, 0), (3, 4)), x)


def test_beyond_a_scan_lies_what_is_asked_for():
    inside = torch.ones(1, 2, 2)
    found = cut(inside, (-1, 0), (4, 3), fill=-1.0)
    assert found.sum() == 4 - 8
    assert (found[:, 1:3, :2] == 1).all()
