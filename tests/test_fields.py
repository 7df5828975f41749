import pytest
import torch

from medseg_diff.diffusion.fields import REACH, SPACINGS, cells, gumbel, kernel, smooth


def white(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("start", [(0, 0), (16, 40), (8, 24)])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_field_has_unit_variance_everywhere(spacing, start):
    """Corners and borders included: its weights on the white noise have unit norm."""
    size = (32, 24)
    shape = [len(cells(a, n, spacing)) for a, n in zip(start, size, strict=True)]
    basis = torch.eye(shape[0] * shape[1]).unflatten(1, shape)
    weights = smooth(basis, start, size, spacing)
    assert weights.shape[1:] == (16, 12)
    torch.testing.assert_close(weights.square().sum(0), torch.ones(16, 12))


@pytest.mark.parametrize("dims", [2, 3])
def test_a_window_sees_what_the_volume_sees(dims):
    volume, start, size = (64,) * dims, (16, 8, 24)[:dims], (16, 32, 24)[:dims]
    for spacing in SPACINGS:
        reached = cells(0, 64, spacing)
        whole = white(2, *[len(reached)] * dims)
        inside = [
            slice(c.start - reached.start, c.stop - reached.start)
            for c in (cells(a, n, spacing) for a, n in zip(start, size, strict=True))
        ]
        part = smooth(whole[(slice(None), *inside)], start, size, spacing)
        box = (slice(None), *(slice(a // 2, (a + n) // 2) for a, n in zip(start, size, strict=True)))
        torch.testing.assert_close(part, smooth(whole, (0,) * dims, volume, spacing)[box])


def test_fields_go_from_rough_to_smooth():
    """Correlation of neighbours that are 8 voxels apart, by the weights alone."""
    found = []
    for spacing in SPACINGS:
        weights = smooth(torch.eye(len(cells(0, 64, spacing))), (0,), (64,), spacing)
        found.append(float(weights[:, 12] @ weights[:, 16]))
    assert found[0] < 0.1 < found[1] < 0.6 < found[2] < 0.9


def test_what_a_box_needs_reaches_beyond_it():
    assert cells(0, 32, 8) == range(-REACH, 4 + REACH)
    assert cells(24, 16, 16) == range(1 - REACH, 3 + REACH)


def test_a_box_off_the_grid_is_an_error():
    for start, length in ((1, 32), (0, 15)):
        with pytest.raises(ValueError, match="pad it"):
            kernel(start, length, 4)


def test_gumbel_noise_draws_what_is_probable():
    """Gumbel-max: the largest of log p + G is k with probability p_k."""
    p = torch.tensor([0.6, 0.3, 0.1])
    drawn = (p.log() + gumbel(white(200_000, 3))).argmax(1)
    shares = torch.bincount(drawn, minlength=3) / len(drawn)
    torch.testing.assert_close(shares, p, atol=5e-3, rtol=0)
    assert torch.isfinite(gumbel(torch.tensor([-50.0, 0.0, 50.0]))).all()
