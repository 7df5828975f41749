import math

import pytest
import torch

from medseg_diff.diffusion.losses import WEIGHTINGS, loss_weight, variational_term
from medseg_diff.diffusion.process import PREDICTIONS, add_noise, posterior, step_variance, target, x0_from
from medseg_diff.diffusion.schedule import levels

F64 = torch.float64
INNER = torch.tensor([1e-4, 0.1, 0.5, 0.9, 0.9999], dtype=F64)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def weights_of_x_0(weighting: str, snr: torch.Tensor, gamma: float, data_std: float) -> torch.Tensor:
    """The papers' factors on the squared error of x_0."""
    return {"min_snr": snr.clamp(max=gamma), "level": snr + 1 / data_std**2}[weighting]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("weighting", ["min_snr", "level"])
@pytest.mark.parametrize(("gamma", "data_std"), [(5.0, 1.0), (1.0, 0.5)])
def test_a_weighting_is_one_loss_whatever_is_predicted(weighting, prediction, gamma, data_std):
    """The weighted error of the network's output is the paper's weighted error of the x_0 that the output means."""
    n = len(INNER)
    x_0, noise, wrong = normal(n), normal(n, seed=1), normal(n, seed=2)
    x_t = add_noise(x_0, noise, INNER)
    output = target(prediction, x_0, noise, INNER) + wrong
    error = (x0_from(prediction, x_t, output, INNER) - x_0) ** 2
    weight = loss_weight(weighting, prediction, INNER, gamma=gamma, data_std=data_std)
    expected = weights_of_x_0(weighting, INNER / (1 - INNER), gamma, data_std) * error
    torch.testing.assert_close(weight * wrong**2, expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_uniform_is_one(prediction):
    assert torch.equal(loss_weight("uniform", prediction, INNER), torch.ones_like(INNER))


def test_level_is_edms():
    """Karras et al. 2022, table 1: lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2."""
    sigma, data_std = ((1 - INNER) / INNER).sqrt(), 0.5
    expected = (sigma**2 + data_std**2) / (sigma * data_std) ** 2
    torch.testing.assert_close(loss_weight("level", "x0", INNER, data_std=data_std), expected)
    torch.testing.assert_close(loss_weight("level", "velocity", INNER), torch.ones_like(INNER))


@pytest.mark.parametrize(
    ("weighting", "prediction", "noise", "clean"),
    [
        ("uniform", "noise", 1, 1),
        ("uniform", "x0", 1, 1),
        ("uniform", "velocity", 1, 1),
        ("min_snr", "noise", 1, 0),
        ("min_snr", "x0", 0, 5),
        ("min_snr", "velocity", 0, 0),
        ("level", "noise", math.inf, 1),
        ("level", "x0", 4, math.inf),
        ("level", "velocity", 4, 1),
    ],
)
def test_ends_are_infinite_only_where_mathematics_is(weighting, prediction, noise, clean):
    ends = torch.tensor([0, 1], dtype=F64)
    assert loss_weight(weighting, prediction, ends, data_std=0.5).tolist() == [noise, clean]
    assert loss_weight(weighting, prediction, ends[0], data_std=0.5).item() == noise


def test_unknown_names():
    with pytest.raises(ValueError, match=r"'snr'.*min_snr"):
        loss_weight("snr", "x0", INNER)
    for weighting in WEIGHTINGS:
        with pytest.raises(ValueError, match=r"'eps'.*velocity"):
            loss_weight(weighting, "eps", INNER)


@pytest.mark.parametrize(("t", "s"), [(0.2, 0.3), (0.0, 0.4), (0.3, 0.99)])
def test_variational_term_is_the_divergence_by_quadrature(t, s):
    alpha_bar_t, alpha_bar_s = torch.tensor([t], dtype=F64), torch.tensor([s], dtype=F64)
    x_0, x_t, estimate, fraction = (torch.tensor([[v]], dtype=F64) for v in (0.7, -0.4, 0.5, 0.3))
    mean, variance = posterior(x_t, x_0, alpha_bar_t, alpha_bar_s)
    other = posterior(x_t, estimate, alpha_bar_t, alpha_bar_s)[0]
    learned = step_variance("learned", x_t, alpha_bar_t, alpha_bar_s, fraction)
    x_s = torch.linspace(-12, 12, 200001, dtype=F64) * variance.sqrt().item() + mean.item()
    q, p = (torch.distributions.Normal(m[0], v[0].sqrt()) for m, v in ((mean, variance), (other, learned)))
    expected = torch.trapezoid(q.log_prob(x_s).exp() * (q.log_prob(x_s) - p.log_prob(x_s)), x_s)
    term = variational_term(x_0, x_t, estimate, fraction, alpha_bar_t, alpha_bar_s)
    torch.testing.assert_close(term[0], expected, rtol=1e-8, atol=1e-10)


def test_variational_term_by_hand():
    """(SNR_s - SNR_t) / 2 times the squared error at the small variance (Kingma et al. 2021)."""
    x_0, x_t, estimate = normal(3, 2, 4), normal(3, 2, 4, seed=1), normal(3, 2, 4, seed=2)
    t, s = torch.tensor([0.2, 0.0, 0.5], dtype=F64), torch.tensor([0.3, 0.5, 0.75], dtype=F64)
    term = variational_term(x_0, x_t, estimate, torch.zeros_like(x_t), t, s)
    gain = s / (1 - s) - t / (1 - t)
    torch.testing.assert_close(term, gain / 2 * ((x_0 - estimate) ** 2).mean((1, 2)))
    assert variational_term(x_0, x_t, x_0, torch.zeros_like(x_t), t, s).abs().max() < 1e-12


def test_variational_term_teaches_the_right_variance():
    """Its least is where the learned variance is the posterior's plus the mean's squared error."""
    path = levels("cosine", 10)
    t, s = path[4], path[5]
    x_t, error = normal(1, 1), 0.2
    x_0 = torch.zeros_like(x_t)
    fractions = torch.linspace(0, 1, 2001, dtype=F64)[:, None]
    many = [x.expand(2001, 1) for x in (x_0, x_t, x_0 + error)]
    best = fractions[variational_term(*many, fractions, t, s).argmin()]
    mean, small = posterior(x_t, x_0, t, s)
    expected = small + (posterior(x_t, x_0 + error, t, s)[0] - mean) ** 2
    torch.testing.assert_close(step_variance("learned", x_t, t, s, best[None]), expected, rtol=1e-3, atol=0)


def test_the_step_to_clean_teaches_nothing_and_breaks_nothing():
    x_0, x_t, estimate = normal(3, 2), normal(3, 2, seed=1), normal(3, 2, seed=2)
    fraction = torch.tensor([0, 0.5, 1], dtype=F64)[:, None].repeat(1, 2).requires_grad_()
    t = torch.tensor([0.5, 0.0, 0.9], dtype=F64)
    term = variational_term(x_0, x_t, estimate, fraction, t, torch.tensor([1.0, 1.0, 0.95], dtype=F64))
    assert term[:2].tolist() == [0, 0]
    assert term[2] > 0
    term.sum().backward()
    assert not fraction.grad[:2].any()
    assert fraction.grad[2].all()
    assert fraction.grad.isfinite().all()
    assert variational_term(x_0, x_t, estimate, fraction, t[0], torch.ones((), dtype=F64)).tolist() == [0, 0, 0]
