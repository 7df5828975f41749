import numpy as np
import pytest
import torch
from monai.metrics.regression import MultiScaleSSIMMetric
from scipy.linalg import sqrtm

from medseg_diff.realism.measures import (
    KERNEL,
    WEIGHTS,
    frechet_distance,
    kernel_distance,
    label_statistics,
    ms_ssim_diversity,
    precision_recall,
)


def gaussian(mean: list[float], covariance: np.ndarray, n: int, seed: int) -> np.ndarray:
    """A sample with exactly this mean and covariance."""
    x = np.random.default_rng(seed).normal(size=(n, len(mean)))
    x -= x.mean(0)
    whitened = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return whitened @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_gaussians_is_that_of_the_closed_form():
    a, b = gaussian([0, 0], np.diag([1.0, 4.0]), 50, 0), gaussian([3, 0], np.diag([4.0, 1.0]), 40, 1)
    assert frechet_distance(a, b) == pytest.approx(9 + (1 - 2) ** 2 + (2 - 1) ** 2)
    cov_a, cov_b = np.array([[2.0, 0.9], [0.9, 1.0]]), np.array([[1.0, -0.6], [-0.6, 3.0]])  # they do not commute
    a, b = gaussian([0, 1], cov_a, 30, 2), gaussian([1, 0], cov_b, 60, 3)
    assert frechet_distance(a, b) == pytest.approx(2 + np.trace(cov_a + cov_b - 2 * np.real(sqrtm(cov_a @ cov_b))))


def test_frechet_distance_with_fewer_images_than_features():
    x = np.random.default_rng(0).normal(size=(9, 30))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 0.5) == pytest.approx(30 * 0.25)
    assert frechet_distance(x, 3 * x - 2 * x.mean(0)) == pytest.approx(4 * x.var(0, ddof=1).sum())


def test_frechet_distance_falls_with_the_number_of_images():
    """Hence only distances with equal numbers are set side by side."""
    rng = np.random.default_rng(0)
    few, many = (frechet_distance(rng.normal(size=(n, 8)), rng.normal(size=(n, 8))) for n in (20, 2000))
    assert few > 10 * many > 0


def test_kernel_distance_by_hand():
    # k(x, y) = (xy + 1)^3; within: k(0, 1) = 1 and k(2, 3) = 343; across: (1 + 1 + 27 + 64) / 4
    a, b = np.array([[0.0], [1.0]]), np.array([[2.0], [3.0]])
    assert kernel_distance(a, b) == pytest.approx(1 + 343 - 2 * 93 / 4)


def test_kernel_distance_is_unbiased_and_sees_a_shift():
    rng = np.random.default_rng(0)
    equal = np.array([kernel_distance(rng.normal(size=(12, 5)), rng.normal(size=(15, 5))) for _ in range(400)])
    assert abs(equal.mean()) < 3 * equal.std() / 20
    assert (equal < 0).any()
    shifted = [kernel_distance(rng.normal(size=(100, 5)), rng.normal(size=(100, 5)) + 0.7) for _ in range(10)]
    assert min(shifted) > 0.3


def test_precision_and_recall_of_nested_and_of_disjoint_sets():
    line = np.arange(100.0)[:, None]
    assert precision_recall(line[:50], line) == (1.0, 0.53)  # the ball of 49 has radius 3 and reaches 52
    assert precision_recall(line, line[:50]) == (0.53, 1.0)
    assert precision_recall(line, line + 0.1) == (1.0, 1.0)
    assert precision_recall(line, line + 1000) == (0.0, 0.0)


def test_precision_needs_realism_and_recall_variety():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(300, 4))
    collapsed, scattered = rng.normal(size=(300, 4)) * 0.1, rng.normal(size=(300, 4)) * 4
    precision, recall = precision_recall(collapsed, real)
    assert precision > 0.9
    assert recall < 0.1
    assert precision_recall(scattered, real)[0] < 0.5


@pytest.mark.parametrize(
    ("size", "scales"), [((16, 48), 2), ((48, 32), 3), ((64, 64), 4), ((112, 112), 5), ((16, 16, 16), 2)]
)
def test_ms_ssim_of_two_images_is_that_of_monai(size, scales):
    images = torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(0)) * 0.2
    images[1] += images[0]
    weights = tuple(weight / sum(WEIGHTS[:scales]) for weight in WEIGHTS[:scales])
    metric = MultiScaleSSIMMetric(len(size), kernel_size=KERNEL, data_range=4.0, weights=weights)
    expected = metric(images[:1] + 2, images[1:] + 2)
    found = ms_ssim_diversity(images, (-2.0, 2.0), pairs=3, seed=0)
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_ms_ssim_orders_sets_by_their_variety():
    noise = torch.randn(12, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    equal, alike = noise[:1].expand(12, 1, 32, 32), noise[:1] + 0.3 * noise
    found = [ms_ssim_diversity(images, (-4.0, 4.0), pairs=40, seed=1) for images in (equal, alike, noise)]
    assert found[0] == pytest.approx(1, abs=1e-5)
    assert found[0] > found[1] + 0.02 > found[2] + 0.3
    with pytest.raises(ValueError, match="lowest and the highest"):
        ms_ssim_diversity(noise, (1.0, 1.0), pairs=4, seed=0)


def test_label_statistics_by_hand():
    masks = np.zeros((4, 5, 5), np.int64)
    masks[0, 0, :2], masks[1, 1, :4], masks[2] = 7, 7, 3
    assert label_statistics(masks, 7, 0.5) == (0.5, 1.5, 0.5)  # 2 and 4 pixels of half a square millimetre
    assert label_statistics(masks, 3, 1.0) == (0.25, 25.0, 0.0)
    assert label_statistics(masks, 9, 1.0) == (0.0, None, None)
