import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from medseg_diff.datasets.slices import cut
from medseg_diff.realism import memorization
from medseg_diff.realism.memorization import find_nearest, memorized, nearest_crop, pooling


def scene(*shape: int, seed: int) -> torch.Tensor:
    """Smooth noise, as images are."""
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    kernel = [5] * (len(shape) - 2)
    pool = functional.avg_pool2d if len(kernel) == 2 else functional.avg_pool3d
    return pool(noise, kernel, stride=1, padding=2) * 5


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Between two crops, channels first, as the definition has it."""
    a, b = ((x.double() - x.double().mean(tuple(range(1, x.ndim)), keepdim=True)).flatten() for x in (a, b))
    return float((a / a.norm() - b / b.norm()).norm())


@pytest.fixture(params=["sums", "fourier"], autouse=True)
def _ways(request, monkeypatch):
    monkeypatch.setattr(memorization, "FEW_POSITIONS", 10**9 if request.param == "sums" else 0)


@pytest.mark.parametrize(
    ("size", "spaces"), [((16, 12), [(20, 15), (14, 17), (16, 12)]), ((8, 8, 6), [(10, 9, 8), (7, 12, 6)])]
)
def test_the_nearest_is_that_of_all_crops(size, spaces):
    slices, channels, fill = 3 if len(size) == 2 else 1, 2, -1.0
    stacks = [scene(slices, channels, *space, seed=i) for i, space in enumerate(spaces)]
    images = scene(4, channels, *size, seed=9)
    found = find_nearest(images, stacks, fill=fill)
    for image, nearest in zip(images, found, strict=True):
        everything = {}
        for number, stack in enumerate(stacks):
            starts = [
                range(n - s + 1) if n > s else [-((s - n) // 2)] for n, s in zip(stack.shape[2:], size, strict=True)
            ]
            for index, *start in itertools.product(range(len(stack)), *starts):
                crop = cut(stack[index], start, size, fill)
                everything[number, index, tuple(start)] = distance(image, crop)
        place = min(everything, key=everything.__getitem__)
        assert (nearest.volume, nearest.index, nearest.start) == place
        assert nearest.distance == pytest.approx(everything[place], abs=1e-3)
        crop = nearest_crop(stacks[nearest.volume], nearest, size, fill)
        assert distance(image, crop) == pytest.approx(nearest.distance, abs=1e-3)


def test_copies_are_found_and_fresh_images_are_not():
    stacks = [scene(6, 1, 40, 36, seed=i) for i in range(4)]
    fresh, held_out = scene(20, 1, 32, 24, seed=50), scene(60, 1, 32, 24, seed=60)
    planted = torch.stack([cut(stacks[i % 4][i % 6], (i % 9, i % 13), (32, 24)) for i in range(20)])
    noise = torch.randn(planted.shape, generator=torch.Generator().manual_seed(7))
    changed = {"copy": planted, "gain": 1.7 * planted - 3, "noise": planted + 0.05 * noise}
    far = np.array([nearest.distance for nearest in find_nearest(held_out, stacks, fill=0.0)])
    for name, images in {**changed, "fresh": fresh}.items():
        found = find_nearest(images, stacks, fill=0.0)
        share, threshold = memorized(np.array([nearest.distance for nearest in found]), far)
        assert share == (pytest.approx(0, abs=0.05) if name == "fresh" else 1), name
        if name != "fresh":
            assert max(nearest.distance for nearest in found) < 0.5 * threshold
            assert [(n.volume, n.index, n.start) for n in found] == [(i % 4, i % 6, (i % 9, i % 13)) for i in range(20)]
    assert max(n.distance for n in find_nearest(planted, stacks, fill=0.0)) < 2e-3


def test_a_negative_is_no_copy():
    stack = scene(2, 1, 20, 20, seed=0)
    assert find_nearest(-stack[:1, :, :16, :16], [stack], fill=0.0)[0].distance > 0.5


def test_flat_images_and_flat_crops_are_like_nothing():
    stack = torch.cat([torch.full((1, 1, 24, 24), -1.0), scene(1, 1, 24, 24, seed=1)])
    flat, image = torch.full((1, 1, 16, 16), 0.3), scene(1, 1, 16, 16, seed=2)
    assert find_nearest(flat, [stack], fill=-1.0)[0].distance == pytest.approx(math.sqrt(2))
    assert find_nearest(image, [stack[:1]], fill=-1.0)[0].distance == pytest.approx(math.sqrt(2))
    assert find_nearest(image, [stack], fill=-1.0)[0].index == 1


def test_pooled_images_are_found_where_they_were():
    stack = scene(3, 1, 60, 50, seed=0)
    (found,) = find_nearest(cut(stack[1], (8, 12), (32, 32))[None], [stack], fill=0.0, factor=4)
    assert (found.index, found.start) == (1, (8, 12))
    assert found.distance < 2e-3
    small = scene(1, 1, 20, 50, seed=1)
    (found,) = find_nearest(cut(small[0], (-6, 4), (32, 32))[None], [small], fill=0.0, factor=2)
    assert found.start == (-6, 4)
    assert found.distance < 2e-3


def test_parts_of_the_images_are_searched_at_a_time(monkeypatch):
    images, stacks = scene(5, 1, 16, 16, seed=0), [scene(2, 1, 20, 20, seed=1)]
    whole = find_nearest(images, stacks, fill=0.0)
    monkeypatch.setattr(memorization, "TOGETHER", 2 * 20 * 20 * 2)
    parts = find_nearest(images, stacks, fill=0.0)
    assert [n.start for n in parts] == [n.start for n in whole]
    np.testing.assert_allclose([n.distance for n in parts], [n.distance for n in whole], atol=1e-5)


def test_pooling_bounds_sides_and_work(monkeypatch):
    stacks = [torch.zeros(1, 1, 128, 48)]
    assert pooling(torch.zeros(3, 1, 64, 48), stacks) == 1
    assert pooling(torch.zeros(3, 1, 96, 48), stacks) == 2
    assert pooling(torch.zeros(3, 1, 1024, 16), stacks) == 2  # 8 voxels are left
    monkeypatch.setattr(memorization, "MOST_WORK", 3 * 128 * 48 // 9)
    assert pooling(torch.zeros(3, 1, 48, 48), stacks) == 3


def test_memorized_is_what_is_nearer_than_the_first_percentile():
    held_out = np.linspace(0, 1, 101)
    assert memorized(np.array([0.0, 0.005, 0.5, 2.0]), held_out) == (0.5, pytest.approx(0.01))
