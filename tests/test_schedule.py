import math

import pytest
import torch

from medseg_diff.diffusion.schedule import KINDS, alpha_bar, betas, discrete_alpha_bar, levels, log_snr

F64 = torch.float64


def published_betas(kind: str) -> torch.Tensor:
    """The 1000 betas of the literature."""
    steps = 1000
    match kind:
        case "linear":
            return torch.linspace(1e-4, 0.02, steps, dtype=F64)
        case "quadratic":
            return torch.linspace(1e-4**0.5, 0.02**0.5, steps, dtype=F64) ** 2
        case "scaled_linear":
            return torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=F64) ** 2
        case "sigmoid":
            return torch.sigmoid(torch.linspace(-6, 6, steps, dtype=F64)) * (0.02 - 1e-4) + 1e-4
    raise ValueError(kind)


@pytest.mark.parametrize(
    ("kind", "t", "expected"),
    [
        ("linear", 0.5, math.exp(-(0.05 + 2.4875))),
        ("linear", 1.0, math.exp(-10.05)),
        ("quadratic", 1.0, math.exp(-1000 * (0.02**1.5 - 1e-6) / 3 / (0.02**0.5 - 0.01))),
        ("scaled_linear", 1.0, math.exp(-1000 * (0.012**1.5 - 0.00085**1.5) / 3 / (0.012**0.5 - 0.00085**0.5))),
        ("sigmoid", 1.0, math.exp(-10.05)),  # the sigmoid is odd about its middle: the mean beta is that of linear
        ("sigmoid", 0.5, math.exp(-0.05 - 19.9 / 12 * (math.log(2) - math.log1p(math.exp(-6))))),
        ("cosine", 0.25, (math.cos(0.258 / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2),
        ("cosine", 0.5, (math.cos(0.508 / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2),
        ("cosine", 1.0, 0.0),
    ],
)
def test_values_by_hand(kind, t, expected):
    value = alpha_bar(kind, torch.tensor(t, dtype=F64), zero_terminal=False)
    assert value.item() == pytest.approx(expected, rel=1e-13, abs=1e-30)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "cosine"])
def test_integral_matches_the_published_discrete_betas(kind):
    discrete = published_betas(kind)
    product = (1 - discrete).log().cumsum(0)
    continuous = discrete_alpha_bar(kind, 1000, zero_terminal=False).log()
    second_order = -(discrete**2).cumsum(0) / 2
    half_a_step = 0.5 * discrete.max().item()
    torch.testing.assert_close(product, continuous + second_order, rtol=0, atol=half_a_step)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("points", [2, 3, 8, 1001])
def test_falls_from_exactly_clean_to_exactly_noise(kind, dtype, points):
    values = alpha_bar(kind, torch.linspace(0, 1, points, dtype=dtype))
    assert values.dtype == dtype
    assert values[0] == 1
    assert values[-1] == 0
    assert (values.diff() < 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_zero_terminal_is_lins_rescaling(kind):
    raw = alpha_bar(kind, torch.linspace(0, 1, 101, dtype=F64), zero_terminal=False).sqrt()
    first, last = raw[0], raw[-1]
    expected = ((raw - last) * first / (first - last)) ** 2  # Lin et al. 2024, algorithm 1, from t = 0 on
    torch.testing.assert_close(alpha_bar(kind, torch.linspace(0, 1, 101, dtype=F64)), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_rescaling_keeps_the_first_step_and_zeroes_the_last(kind):
    raw, rescaled = (discrete_alpha_bar(kind, 1000, zero_terminal=zero) for zero in (False, True))
    assert abs(raw[0] - rescaled[0]) < 1e-4
    assert rescaled[-1] == 0
    if kind != "cosine":  # which ends at zero by itself
        assert 1e-5 < raw[-1] < 5e-3


@pytest.mark.parametrize("kind", KINDS)
def test_betas_multiply_back_to_alpha_bar(kind):
    alpha_bars = discrete_alpha_bar(kind, 100)
    chain = betas(alpha_bars)
    torch.testing.assert_close((1 - chain).cumprod(0), alpha_bars, rtol=1e-12, atol=1e-15)
    assert chain[-1] == 1  # the last step leaves nothing of x_0
    assert ((chain > 0) & (chain <= 1)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_path_of_few_steps_lies_on_the_path_of_many(kind):
    path = levels(kind, 10)
    assert path.shape == (11,)
    assert path[0] == 0
    assert path[-1] == 1
    torch.testing.assert_close(path, levels(kind, 1000)[::100], rtol=1e-14, atol=0)
    torch.testing.assert_close(path[:-1].flip(0), discrete_alpha_bar(kind, 10), rtol=1e-14, atol=0)
    assert levels(kind, 1).tolist() == [0, 1]


def test_levels_can_keep_the_published_end():
    assert levels("linear", 50, zero_terminal=False)[0].item() == pytest.approx(math.exp(-10.05))


def test_log_snr():
    values = log_snr(torch.tensor([0, 0.5, 0.9, 1], dtype=F64))
    torch.testing.assert_close(values, torch.tensor([-math.inf, 0, math.log(9), math.inf], dtype=F64))


def test_unknown_kind_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'cosin'.*cosine"):
        alpha_bar("cosin", torch.tensor(0.5))
