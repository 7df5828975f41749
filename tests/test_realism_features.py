from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional

from medseg_diff.realism.features import (
    BLOCKS,
    BOTTLENECK,
    Autoencoder,
    Extractor,
    explained,
    features,
    train_extractor,
)


def draw(size: tuple[int, ...], count: int, batch: int) -> torch.Tensor:
    """Bright ellipses of two kinds on a dark ground, with a little noise."""
    rng = np.random.default_rng((batch, count))
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in size], indexing="ij"))
    centre = rng.uniform(-0.4, 0.4, (count, len(size), *(1,) * len(size)))
    radius = rng.uniform(0.2, 0.6, centre.shape)
    distance = (((grid - centre) / radius) ** 2).sum(1, keepdims=True)
    image = 1 / (1 + np.exp(4 * (distance - 1))) + 0.03 * rng.normal(size=distance.shape)
    return torch.from_numpy(image.astype(np.float32))


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return train_extractor(partial(draw, (32, 24)), seed=0, steps=150)


def test_features_describe_the_images(extractor):
    images = draw((32, 24), 100, 1000)
    assert explained(extractor, images) > 0.8
    found = features(extractor, images)
    assert found.shape == (100, BOTTLENECK + BLOCKS[2] ** 2)
    np.testing.assert_allclose(found.mean(0), 0, atol=0.5)
    np.testing.assert_allclose(found.std(0), 1, atol=0.8)


def test_features_see_noise_and_blur_in_what_is_missed(extractor):
    images = draw((32, 24), 50, 2000)
    noisy = images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    smooth = functional.avg_pool2d(images, 3, stride=1, padding=1)
    real, more, less = (features(extractor, x)[:, BOTTLENECK:].mean() for x in (images, noisy, smooth))
    assert more > real + 1
    assert less < real - 0.2


def test_the_same_seed_gives_the_same_features(extractor):
    images = draw((32, 24), 10, 3000)
    state = torch.get_rng_state()
    again = train_extractor(partial(draw, (32, 24)), seed=0, steps=150)
    np.testing.assert_array_equal(features(again, images), features(extractor, images))
    other = train_extractor(partial(draw, (32, 24)), seed=1, steps=1)
    assert not np.allclose(features(other, images), features(extractor, images), atol=0.1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("size", "seen"),
    [((16, 48), (16, 48)), ((160, 16), (53, 5)), ((16, 16, 16), (16, 16, 16)), ((64, 48, 32), (32, 24, 16))],
)
def test_images_of_every_size_are_rebuilt_as_the_network_sees_them(size, seen):
    network = Autoencoder(2, size)
    x = network.pooled(torch.randn(3, 2, *size))
    assert x.shape == network(x).shape == (3, 2, *seen)


def test_volumes_have_features_too():
    extractor = train_extractor(partial(draw, (16, 16, 16)), seed=0, steps=3)
    assert features(extractor, draw((16, 16, 16), 4, 0)).shape == (4, BOTTLENECK + BLOCKS[3] ** 3)
