import numpy as np
import pytest
import torch

from medseg_diff.diffusion.masks import from_analog, one_hot, pool, to_analog, to_labels


def labels(*shape: int, classes: int = 3) -> torch.Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 5, 4, 3)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_label_maps_survive_the_round_trip(shape, dtype):
    label_map = labels(*shape).to(dtype)
    encoded = one_hot(label_map, 3)
    assert encoded.shape == (2, 3, *shape[1:])
    assert torch.equal(encoded[:, 1], (label_map == 1).float())
    assert torch.equal(encoded.sum(1), torch.ones(shape))
    assert torch.equal(to_labels(encoded), label_map.to(torch.uint8))
    torch.testing.assert_close(from_analog(to_analog(encoded, 0.3), 0.3), encoded)


def test_absent_class_has_its_channel_and_unknown_label_is_an_error():
    assert one_hot(torch.zeros(1, 2, 2, dtype=torch.int64), 4).shape == (1, 4, 2, 2)
    with pytest.raises(RuntimeError):
        one_hot(torch.full((1, 2, 2), 3), 3)
    with pytest.raises(RuntimeError):
        one_hot(torch.full((1, 2, 2), -1), 3)


def test_analog_values_by_hand():
    p = torch.tensor([0, 0.25, 0.5, 1], dtype=torch.float64).reshape(1, 1, 4)
    x = to_analog(p, 0.5)
    assert x.flatten().tolist() == [-0.5, -0.25, 0, 0.5]
    torch.testing.assert_close(from_analog(x, 0.5), p)
    assert from_analog(3 * x, 0.5).flatten().tolist() == [0, 0, 0.5, 1]


@pytest.mark.parametrize("space", [(4, 6), (4, 6, 2)])
def test_pool_is_the_mean_of_blocks(space):
    x = torch.arange(2 * 3 * torch.Size(space).numel(), dtype=torch.float64).reshape(2, 3, *space)
    pooled = pool(x, 2)
    assert pooled.shape == (2, 3, *(size // 2 for size in space))
    last = x[1, 2][tuple(slice(-2, None) for _ in space)]
    assert pooled[1, 2].flatten()[-1] == last.mean()
    assert pooled.mean() == x.mean()
    assert torch.equal(pool(x, 1), x)


def test_pooled_one_hot_holds_class_fractions():
    label_map = torch.tensor([[[0, 1], [1, 2]]])
    assert pool(one_hot(label_map, 3), 2).flatten().tolist() == [0.25, 0.5, 0.25]


@pytest.mark.parametrize("space", [(4, 5), (4, 4, 3)])
def test_pool_refuses_to_drop_an_edge(space):
    with pytest.raises(ValueError, match="x".join(map(str, space))):
        pool(torch.zeros(1, 1, *space), 2)


@pytest.mark.parametrize("classes", [1, 2, 5, 256])
def test_labels_are_the_first_of_the_largest_channels(classes):
    x = torch.randint(0, 3, (2, classes, 6, 7), generator=torch.Generator().manual_seed(0)).float()
    assert np.array_equal(to_labels(x).numpy(), x.numpy().argmax(1))
