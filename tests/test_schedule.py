import math

import pytest
import torch

from medseg_diff.diffusion.schedule import KINDS, SPACINGS, alpha_bar, betas, discrete_alpha_bar, levels, log_snr

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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero_terminal", [True, False])
def test_shift_is_added_to_the_log_snr(kind, zero_terminal):
    t = torch.linspace(0, 1, 101, dtype=F64)
    plain, shifted, none = (alpha_bar(kind, t, zero_terminal=zero_terminal, shift=s) for s in (0.0, -1.5, 0.0))
    torch.testing.assert_close(log_snr(shifted)[1:-1], log_snr(plain)[1:-1] - 1.5, rtol=1e-9, atol=1e-9)
    assert shifted[0] == 1
    assert (shifted[-1] == 0) == (plain[-1] == 0)
    assert torch.equal(plain, none)


@pytest.mark.parametrize("b", [0.25, 0.5, 2.0])
def test_shift_does_what_an_input_scale_does(b):
    """SNR of b x_0 under the plain schedule, against that of x_0 under the shifted one (Chen 2023)."""
    t = torch.linspace(0.1, 0.9, 9, dtype=F64)
    plain, shifted = alpha_bar("cosine", t), alpha_bar("cosine", t, shift=2 * math.log(b))
    torch.testing.assert_close(shifted / (1 - shifted), b**2 * plain / (1 - plain))


def test_shift_follows_the_resolution():
    """Blocks of 4 x 4 pixels average the noise down by 4: at side 256 as noisy as 64 was (Hoogeboom et al. 2023)."""
    t = torch.linspace(0.1, 0.9, 9, dtype=F64)
    small, large = alpha_bar("cosine", t), alpha_bar("cosine", t, shift=2 * math.log(64 / 256))
    averaged_noise = (1 - large) / large / 4**2
    torch.testing.assert_close(averaged_noise, (1 - small) / small)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero_terminal", [True, False])
@pytest.mark.parametrize("shift", [0.0, -1.5, 2.0])
def test_chain_and_path_are_the_same_curve(kind, zero_terminal, shift):
    options = {"zero_terminal": zero_terminal, "shift": shift}
    curve = alpha_bar(kind, torch.arange(1, 41, dtype=F64) / 40, **options)
    assert torch.equal(discrete_alpha_bar(kind, 40, **options), curve)
    assert torch.equal(levels(kind, 40, **options)[:-1].flip(0), curve)


def times(spacing: str, steps: int, train_steps: int = 1000) -> list[float]:
    """The times of a path, read back from the levels of a schedule without a flat end."""
    path = levels("linear", steps, spacing=spacing, train_steps=train_steps, zero_terminal=False)
    integral = -path.log() / 1000  # = 1e-4 t + 0.0199 t^2 / 2
    t = ((1e-8 + 2 * 0.0199 * integral).sqrt() - 1e-4) / 0.0199
    return (t * train_steps).tolist()


@pytest.mark.parametrize(
    ("spacing", "steps", "expected"),
    [
        ("trailing", 4, [1000, 750, 500, 250, 0]),
        ("trailing", 3, [1000, 2000 / 3, 1000 / 3, 0]),
        ("leading", 4, [751, 501, 251, 1, 0]),
        ("leading", 3, [667, 334, 1, 0]),
        ("linspace", 4, [1000, 667, 334, 1, 0]),
        ("linspace", 3, [1000, 501, 1, 0]),  # half-way, and rounded as an index from 0, to the even one
        ("linspace", 1, [1000, 0]),
    ],
)
def test_spacings_by_hand(spacing, steps, expected):
    assert times(spacing, steps) == pytest.approx(expected, abs=1e-6)


def test_spacings_on_another_grid():
    assert times("leading", 4, 50) == pytest.approx([37, 25, 13, 1, 0], abs=1e-6)
    assert times("linspace", 4, 50) == pytest.approx([50, 34, 17, 1, 0], abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero_terminal", [True, False])
def test_log_snr_spacing_is_even_between_its_ends(kind, zero_terminal):
    path = levels(kind, 12, spacing="log_snr", zero_terminal=zero_terminal)
    pure = path[0] == 0
    assert pure == (zero_terminal or kind == "cosine")
    even = log_snr(path[:-1][path[:-1] > 0])
    torch.testing.assert_close(even.diff(), even.diff()[:1].expand(len(even) - 1), rtol=1e-7, atol=0)
    first = 0.999 if pure else 1.0
    ends = alpha_bar(kind, torch.tensor([first, 0.001], dtype=F64), zero_terminal=zero_terminal)
    torch.testing.assert_close(even[[0, -1]], log_snr(ends))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
def test_every_path_rises_to_clean(kind, spacing, steps):
    for options in ({}, {"zero_terminal": False}, {"shift": -3.0}):
        path = levels(kind, steps, spacing=spacing, **options)
        assert path.shape == (steps + 1,)
        assert path.dtype == F64
        assert (path.diff() > 0).all()
        assert path[-1] == 1
    noisiest = alpha_bar(kind, torch.ones((), dtype=F64))
    assert (levels(kind, steps, spacing=spacing)[0] == noisiest) == (spacing != "leading" or steps == 1000)


def test_spacings_coincide_where_every_level_is_taken():
    trailing, leading, linspace = (levels("cosine", 1000, spacing=s) for s in ("trailing", "leading", "linspace"))
    torch.testing.assert_close(leading, trailing, rtol=1e-12, atol=0)
    torch.testing.assert_close(linspace, trailing, rtol=1e-12, atol=0)


def test_log_snr():
    values = log_snr(torch.tensor([0, 0.5, 0.9, 1], dtype=F64))
    torch.testing.assert_close(values, torch.tensor([-math.inf, 0, math.log(9), math.inf], dtype=F64))


def test_unknown_kind_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'cosin'.*cosine"):
        alpha_bar("cosin", torch.tensor(0.5))


def test_unknown_spacing_and_too_many_steps():
    with pytest.raises(ValueError, match=r"'karras'.*log_snr"):
        levels("cosine", 10, spacing="karras")
    for spacing in ("leading", "linspace"):
        with pytest.raises(ValueError, match="100 levels to choose from, not 101"):
            levels("cosine", 101, spacing=spacing, train_steps=100)
    assert len(levels("cosine", 101, train_steps=100)) == 102
