"""Samplers against laws whose perfect denoiser is known in closed form: no network, known answers."""

import math
from itertools import pairwise

import pytest
import torch
from known_laws import (
    F64,
    MEAN,
    STD,
    even_normal,
    fresh_noise,
    gaussian_draw,
    gaussian_mean,
    generator,
    mixture_mean,
    mixture_weights,
    normal,
)
from monai.networks.schedulers import DDPMScheduler

from medseg_diff.diffusion.process import add_noise
from medseg_diff.diffusion.sampler import METHODS, sample
from medseg_diff.diffusion.schedule import KINDS, SPACINGS, alpha_bar, levels

GRIDS = [("trailing", 1000), *((spacing, 100) for spacing in SPACINGS), ("trailing", 20)]
RANDOM = ("ddpm", "dpm++sde")


def gaussian_std(level: torch.Tensor) -> torch.Tensor:
    """The std of x_t for x_0 ~ N(MEAN, STD^2)."""
    return (STD**2 * level + 1 - level).sqrt()


def law(path: torch.Tensor, **options) -> tuple[float, float]:
    """Mean and std of what a sampler makes of N(MEAN, STD^2), from the true law at the path's first level.

    Without Monte Carlo error: the sampler is affine in x_T and in the noise of every step, so each item of the batch
    lets one of them be 1 and the others 0, and the last one none.
    """
    sources = torch.cat([torch.eye(len(path), dtype=F64), torch.zeros(1, len(path), dtype=F64)])
    x_T = path[0].sqrt() * MEAN + gaussian_std(path[0]) * sources[:, 0]
    x = sample(gaussian_mean, x_T, path, noise=lambda step: sources[:, step + 1], **options)
    return x[-1].item(), (x[:-1] - x[-1]).norm().item()


def recursive_std(path: torch.Tensor, method: str, eta: float = 0.0, variance: str = "small") -> float:
    """The std that `law` must find, by the covariance of x and of the estimate before: every step is affine in the two.

    Written unlike the code: in alpha = sqrt(abar), sigma = sqrt(1 - abar), h = log(alpha_s sigma_t / alpha_t sigma_s),
    as the papers have the steps; the estimate, but for its mean, is g x.
    """
    xx, xd, dd, h_before = STD**2 * path[0].item() + 1 - path[0].item(), 0.0, 0.0, math.inf
    for t, s in pairwise(path.tolist()):
        alpha_t, sigma_t, alpha_s, sigma_s = math.sqrt(t), math.sqrt(1 - t), math.sqrt(s), math.sqrt(1 - s)
        shrink = alpha_t * sigma_s / (alpha_s * sigma_t)  # exp(-h)
        h = -math.log(shrink) if shrink else math.inf
        ahead = h / (2 * h_before) if s < 1 and h_before < math.inf else 0.0  # 1 / 2r, of D = x_0 + (x_0 - before) / 2r
        g = STD**2 * alpha_t / (STD**2 * t + 1 - t)
        a, b, fresh = math.nan, 0.0, 0.0  # x_s = a x_t + b (estimate before) + sqrt(fresh) noise
        match method:
            case "ddpm":  # Ho et al. 2020, eq. 6 and 7
                beta = 1 - t / s
                a = alpha_s * beta / sigma_t**2 * g + alpha_t / alpha_s * (sigma_s / sigma_t) ** 2
                fresh = (beta if variance == "large" else beta * (sigma_s / sigma_t) ** 2) if s < 1 else 0.0
            case "ddim":  # Song et al. 2020, eq. 12 and 16
                fresh = (eta * sigma_s / sigma_t) ** 2 * (1 - t / s)
                a = alpha_s * g + math.sqrt(sigma_s**2 - fresh) * (1 - alpha_t * g) / sigma_t
            case "dpm++":  # Lu et al. 2022, alg. 2
                a = sigma_s / sigma_t + alpha_s * (1 - shrink) * (1 + ahead) * g
                b = -alpha_s * (1 - shrink) * ahead
            case "dpm++sde":  # Lu et al. 2022, SDE-DPM-Solver++(2M)
                a = sigma_s / sigma_t * shrink + alpha_s * (1 - shrink**2) * (1 + ahead) * g
                b = -alpha_s * (1 - shrink**2) * ahead
                fresh = sigma_s**2 * (1 - shrink**2)
            case "heun":  # Karras et al. 2022, alg. 1, in x / alpha and sigma / alpha
                a = sigma_s / sigma_t * (1 - alpha_t * g) + alpha_s * g
                if t > 0 and s < 1:
                    here, there = sigma_t / alpha_t, sigma_s / alpha_s
                    g_s = STD**2 * alpha_s / (STD**2 * s + 1 - s)
                    slopes = (1 / alpha_t - g) / here + (a / alpha_s - g_s * a) / there
                    a = alpha_s * (1 / alpha_t + (there - here) * slopes / 2)
        xx, xd, dd = a * a * xx + 2 * a * b * xd + b * b * dd + fresh, g * (a * xx + b * xd), g * g * xx
        h_before = h
    return math.sqrt(xx)


SAMPLERS = {
    "small": {"method": "ddpm"},
    "large": {"method": "ddpm", "variance": "large"},
    "ddim": {"method": "ddim"},
    "eta": {"method": "ddim", "eta": 0.5},
    "dpm++": {"method": "dpm++"},
    "dpm++sde": {"method": "dpm++sde"},
    "heun": {"method": "heun"},
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("spacing", "steps"),
    [("trailing", 1), ("trailing", 2), *((spacing, 20) for spacing in SPACINGS), ("trailing", 100)],
)
def test_the_std_of_few_steps_is_that_of_the_papers_recursion(kind, spacing, steps, name):
    """From pure noise and, with leading spacing, from a level that holds some signal; the mean is exact."""
    path = levels(kind, steps, spacing=spacing)
    mean, std = law(path, **SAMPLERS[name])
    assert mean == pytest.approx(MEAN, rel=1e-9)
    assert std == pytest.approx(recursive_std(path, **SAMPLERS[name]), rel=1e-9)


@pytest.mark.parametrize(
    ("name", "biases"),
    [
        ("small", [-0.0020, -0.0175, -0.0280, -0.0677]),
        ("large", [+0.0004, +0.0046, +0.0129, +0.0158]),
        ("ddim", [-0.0008, -0.0077, -0.0145, -0.0379]),
        ("eta", [-0.0011, -0.0097, -0.0177, -0.0436]),
        ("dpm++", [-0.0000, +0.0019, +0.0004, -0.0015]),
        ("dpm++sde", [+0.0000, +0.0078, +0.0011, +0.0157]),
        ("heun", [-0.0000, +0.0001, +0.0008, -0.0049]),
    ],
)
def test_how_far_finite_steps_are_from_the_truth(name, biases):
    """By how much the std exceeds 0.5 over the whole schedule, respaced to a tenth in two ways, and in 20 steps."""
    grids = [("trailing", 1000), ("leading", 100), ("log_snr", 100), ("trailing", 20)]
    found = [law(levels("cosine", steps, spacing=spacing), **SAMPLERS[name])[1] - STD for spacing, steps in grids]
    assert found == pytest.approx(biases, abs=6e-5)


def test_learned_variance_of_the_true_spread_is_exact_over_any_spacing():
    """The best step's variance lies between small and large; with it a Gaussian has no bias however few the steps."""
    path = levels("cosine", 7)
    following = dict(pairwise(path.tolist()))

    def denoise(x_t, alpha_bar_t):
        s = torch.tensor(following[alpha_bar_t.item()], dtype=F64)
        spread = STD**2 * (1 - alpha_bar_t) / gaussian_std(alpha_bar_t) ** 2  # Var(x_0 | x_t)
        beta = 1 - alpha_bar_t / s
        small = beta * (1 - s) / (1 - alpha_bar_t)
        true = small + s * (beta / (1 - alpha_bar_t)) ** 2 * spread
        fraction = (true / small).log() / (beta / small).log() if s < 1 else torch.tensor(0.5, dtype=F64)
        return gaussian_mean(x_t, alpha_bar_t), fraction.expand_as(x_t)

    sources = torch.cat([torch.eye(len(path), dtype=F64), torch.zeros(1, len(path), dtype=F64)])
    x = sample(denoise, sources[:, 0], path, method="ddpm", noise=lambda step: sources[:, step + 1])
    # Before the last step, which answers with the mean, the law is exact: its std is that of E[x_0 | x_t] there.
    t = path[-2]
    expected = STD**2 * t.sqrt() / gaussian_std(t)
    assert (x[:-1] - x[-1]).norm().item() == pytest.approx(expected.item(), rel=1e-10)
    assert x[-1].item() == pytest.approx(MEAN, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_ancestral_with_draws_is_exact_over_any_spacing(kind, steps):
    n = 20_000
    x = sample(gaussian_draw(), normal(n), levels(kind, steps), method="ddpm", noise=fresh_noise(n))
    assert x.mean().item() == pytest.approx(MEAN, abs=4 * STD / math.sqrt(n))
    assert x.std().item() == pytest.approx(STD, abs=4 * STD / math.sqrt(2 * n))


def test_ancestral_with_draws_of_two_points_keeps_their_weights():
    n, p = 20_000, 0.3
    points = torch.tensor([1, -1], dtype=F64)
    source = generator(3)

    def denoise(x_t, alpha_bar_t):
        first = mixture_weights(x_t, alpha_bar_t, torch.tensor([p, 1 - p], dtype=F64), points, 0.0)[:, 0]
        return torch.where(torch.rand(n, generator=source, dtype=F64) < first, 1.0, -1.0).to(F64)

    x = sample(denoise, normal(n), levels("cosine", 5), method="ddpm", noise=fresh_noise(n))
    assert set(x.tolist()) == {1, -1}
    assert (x == 1).double().mean().item() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))


@pytest.mark.parametrize(
    ("spacing", "steps", "weights", "means", "std"),
    [
        *((*grid, [0.2, 0.5, 0.3], [-1.0, 0.0, 1.2], 0.1) for grid in GRIDS),
        *((*grid, [0.3, 0.7], [1.0, -1.0], 0.0) for grid in GRIDS[1:]),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_mixtures_and_points_keep_weights_means_and_stds(method, spacing, steps, weights, means, std):
    """From the true law at the first level; four Monte Carlo errors where noise is drawn, and the bias of the steps."""
    n, path = 2_000, levels("cosine", steps, spacing=spacing)
    p, centres = torch.tensor(weights, dtype=F64), torch.tensor(means, dtype=F64)
    x_0 = centres[torch.multinomial(p, n, True, generator=generator(5))] + std * normal(n, seed=6)
    x_T = add_noise(x_0, even_normal(n), path[0])
    x = sample(mixture_mean(p, centres, std), x_T, path, method=method, noise=fresh_noise(n))
    nearest = (x[:, None] - centres).abs().argmin(1)
    errors = 4 if method in RANDOM else 0
    weight_bias = (1.5 if method in ("ddpm", "ddim") else 0.2) / steps
    for k, weight in enumerate(weights):
        group = x[nearest == k]
        error = errors * std / math.sqrt(weight * n)
        assert len(group) / n == pytest.approx(weight, abs=errors * math.sqrt(weight * (1 - weight) / n) + weight_bias)
        assert group.mean().item() == pytest.approx(means[k], abs=error + 1 / steps)
        assert group.std().item() == pytest.approx(std, abs=error / math.sqrt(2) + 1 / steps)


def test_monai_respaced_is_wrong_where_ours_is_right():
    """MONAI 1.6.1 steps from t to t - 1 of 1000 whatever the spacing: 0.886 where 0.5 is right."""
    n = 20_000
    scheduler = DDPMScheduler(clip_sample=False, prediction_type="sample")
    scheduler.set_timesteps(100)
    x, source = normal(n), generator(1)
    for t in scheduler.timesteps:
        level = scheduler.alphas_cumprod[t].double()
        x, _ = scheduler.step(gaussian_mean(x, level)[:, None], t, x[:, None], source)
        x = x[:, 0].double()
    monte_carlo = 4 / math.sqrt(2 * n)
    assert x.std().item() == pytest.approx(0.886, abs=0.886 * monte_carlo)
    path = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], torch.ones(1)]).double()
    ours = sample(gaussian_mean, normal(n), path, method="ddpm", noise=fresh_noise(n))
    assert ours.std().item() == pytest.approx(recursive_std(path, "ddpm"), abs=STD * monte_carlo)
    assert ours.std().item() == pytest.approx(STD, abs=4 / 100)  # the bias of 100 steps
    assert law(path, method="dpm++")[1] == pytest.approx(STD, abs=0.01)


@pytest.mark.parametrize("method", ["ddim", "dpm++", "heun"])
@pytest.mark.parametrize("kind", ["quadratic", "sigmoid", "scaled_linear"])
def test_deterministic_samplers_turn_noise_into_the_gaussian(method, kind):
    """The flow of N(MEAN, STD^2) is x_0 = MEAN + STD x_T."""
    noise = even_normal(101)
    x = sample(gaussian_mean, noise, levels(kind, 500), method=method)
    torch.testing.assert_close(x, MEAN + STD * noise, rtol=0, atol=0.02 if method == "ddim" else 0.005)


def slope(errors: list[float]) -> float:
    """The order of convergence between 64 and 256 steps."""
    return math.log(errors[0] / errors[1]) / math.log(4)


@pytest.mark.parametrize(
    ("name", "order"),
    [("small", 1), ("large", 1), ("ddim", 1), ("eta", 1), ("dpm++", 2), ("dpm++sde", 2), ("heun", 2)],
)
def test_order_of_convergence(name, order):
    """Between log-SNR -6 and 6 in even steps, where the theory's assumptions hold; of random methods, the weak order.

    The error is that of the std, since the mean is exact at every level; the exact flow keeps the standard score.
    """
    paths = [torch.sigmoid(torch.linspace(-6, 6, n + 1, dtype=F64)) for n in (64, 256)]
    errors = [abs(law(path, **SAMPLERS[name])[1] - gaussian_std(path[-1]).item()) for path in paths]
    assert slope(errors) == pytest.approx(order, abs=0.05)


@pytest.mark.parametrize(("method", "least", "most"), [("ddim", 0.95, 1.05), ("dpm++", 1.9, 2.5), ("heun", 1.7, 2.1)])
def test_order_from_pure_noise(method, least, most):
    """The first-order first step from pure noise does not spoil the second order of the rest.

    Heun pays a logarithm: its steps are long in sigma, which falls from infinity.
    """
    paths = [alpha_bar("cosine", torch.linspace(1, 0.1, n + 1, dtype=F64)) for n in (64, 256)]
    errors = [abs(law(path, method=method)[1] - gaussian_std(path[-1]).item()) for path in paths]
    assert least < slope(errors) < most


def test_second_order_pays_at_equal_calls():
    calls = {"ddim": 20, "dpm++": 20, "heun": 11}  # of Heun two a step, but one in the first and in the last
    errors = {method: abs(law(levels("cosine", steps), method=method)[1] - STD) for method, steps in calls.items()}
    assert errors["dpm++"] < errors["ddim"] / 5
    assert errors["heun"] < errors["ddim"] / 2
