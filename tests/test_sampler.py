"""Samplers against laws whose perfect denoiser is known in closed form: no network, known answers."""

import math
from itertools import pairwise

import pytest
import torch

from medseg_diff.diffusion.sampler import METHODS, ancestral_step, ddim_step, sample
from medseg_diff.diffusion.schedule import KINDS, alpha_bar, levels

F64 = torch.float64
MEAN, STD = 0.3, 0.5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=F64)


def even_normal(n: int) -> torch.Tensor:
    """n quantiles of the standard normal: deterministic samplers then have no Monte Carlo error."""
    return math.sqrt(2) * torch.erfinv((2 * torch.arange(n, dtype=F64) + 1) / n - 1)


def fresh_noise(n: int, seed: int = 1):
    source = generator(seed)
    return lambda step: torch.randn(n, generator=source, dtype=F64)


def noise_of(shape: tuple[int, ...]):
    return lambda step: normal(*shape, seed=100 + step)


def gaussian_mean(x_t, alpha_bar_t):
    """E[x_0 | x_t] for x_0 ~ N(MEAN, STD^2)."""
    gain = STD**2 * alpha_bar_t.sqrt() / (STD**2 * alpha_bar_t + 1 - alpha_bar_t)
    return MEAN + gain * (x_t - alpha_bar_t.sqrt() * MEAN)


def gaussian_draw(seed: int = 2):
    """A draw of x_0 given x_t for x_0 ~ N(MEAN, STD^2)."""
    source = generator(seed)

    def denoise(x_t, alpha_bar_t):
        variance = STD**2 * (1 - alpha_bar_t) / (STD**2 * alpha_bar_t + 1 - alpha_bar_t)
        return gaussian_mean(x_t, alpha_bar_t) + variance.sqrt() * torch.randn(x_t.shape, generator=source, dtype=F64)

    return denoise


def mixture_weights(x_t, alpha_bar_t, weights, means, std):
    """p(component | x_t)."""
    variance = std**2 * alpha_bar_t + 1 - alpha_bar_t
    log_likelihood = -((x_t[:, None] - alpha_bar_t.sqrt() * means) ** 2) / (2 * variance)
    return torch.softmax(weights.log() + log_likelihood, 1)


def mixture_mean(weights, means, std):
    """E[x_0 | x_t] for a mixture of Gaussians of one std; of points where std = 0."""

    def denoise(x_t, alpha_bar_t):
        gain = std**2 * alpha_bar_t.sqrt() / (std**2 * alpha_bar_t + 1 - alpha_bar_t)
        each = means + gain * (x_t[:, None] - alpha_bar_t.sqrt() * means)
        return (mixture_weights(x_t, alpha_bar_t, weights, means, std) * each).sum(1)

    return denoise


def ancestral_std(path: torch.Tensor) -> float:
    """The std that ancestral sampling with the mean of N(MEAN, STD^2) must have: the step is affine in x_t.

    Written unlike the code: x_s = sqrt(abar_s) x_0 + what is kept of x_t's noise + fresh noise (DDIM, eq. 12).
    """
    variance = 1.0
    for t, s in pairwise(path.tolist()):
        gain = STD**2 * math.sqrt(t) / (STD**2 * t + 1 - t)
        fresh = (1 - s) / (1 - t) * (1 - t / s)
        kept = math.sqrt((1 - s - fresh) / (1 - t))
        variance = (math.sqrt(s) * gain + kept * (1 - math.sqrt(t) * gain)) ** 2 * variance + fresh
    return math.sqrt(variance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_ancestral_with_draws_is_exact_over_any_spacing(kind, steps):
    n = 20_000
    x = sample(gaussian_draw(), normal(n), levels(kind, steps), method="ddpm", noise=fresh_noise(n))
    assert x.mean().item() == pytest.approx(MEAN, abs=4 * STD / math.sqrt(n))
    assert x.std().item() == pytest.approx(STD, abs=4 * STD / math.sqrt(2 * n))


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [10, 100, 1000])
def test_ancestral_with_means_has_the_std_of_its_recursion(kind, steps):
    """Where a sampler that takes every step for 1/1000 returns 0.886 at 100 of 1000 steps (MONAI 1.6.1)."""
    n = 4_000 if steps == 1000 else 20_000
    path = levels(kind, 1000)[:: 1000 // steps]
    x = sample(gaussian_mean, normal(n), path, method="ddpm", noise=fresh_noise(n))
    expected = ancestral_std(path)
    assert x.mean().item() == pytest.approx(MEAN, abs=4 * STD / math.sqrt(n))
    assert x.std().item() == pytest.approx(expected, abs=4 * expected / math.sqrt(2 * n))
    assert expected == pytest.approx(STD, abs=4 / steps + 5e-4)  # the bias of few steps is known and vanishes


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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [60, 250])
def test_two_points_keep_their_weights(method, steps):
    n, p = 4_000, 0.3
    denoise = mixture_mean(torch.tensor([p, 1 - p], dtype=F64), torch.tensor([1, -1], dtype=F64), 0.0)
    x = sample(denoise, even_normal(n), levels("cosine", steps), method=method, noise=fresh_noise(n))
    assert (x.abs() - 1).abs().mean() < 0.02  # the samples lie on the points
    monte_carlo = 4 * math.sqrt(p * (1 - p) / n) if method == "ddpm" else 0
    assert (x > 0).double().mean().item() == pytest.approx(p, abs=monte_carlo + 1 / steps)


@pytest.mark.parametrize("method", METHODS)
def test_mixture_keeps_weights_means_and_stds(method):
    n, steps = 4_000, 250
    weights, means, std = (torch.tensor(v, dtype=F64) for v in ([0.2, 0.5, 0.3], [-1.0, 0.0, 1.2], 0.1))
    x = sample(
        mixture_mean(weights, means, std), even_normal(n), levels("cosine", steps), method=method, noise=fresh_noise(n)
    )
    nearest = (x[:, None] - means).abs().argmin(1)
    for k, (weight, mean) in enumerate(zip(weights.tolist(), means.tolist(), strict=True)):
        group = x[nearest == k]
        monte_carlo = 4 * math.sqrt(weight * (1 - weight) / n) if method == "ddpm" else 0
        assert len(group) / n == pytest.approx(weight, abs=monte_carlo + 2 / steps)
        assert group.mean().item() == pytest.approx(mean, abs=0.02)
        assert group.std().item() == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("method", ["ddim", "dpm++"])
@pytest.mark.parametrize("kind", KINDS)
def test_deterministic_samplers_turn_noise_into_the_gaussian(method, kind):
    """The flow of N(MEAN, STD^2) is x_0 = MEAN + STD x_T."""
    noise = even_normal(101)
    x = sample(gaussian_mean, noise, levels(kind, 500), method=method)
    torch.testing.assert_close(x, MEAN + STD * noise, rtol=0, atol=0.02 if method == "ddim" else 0.005)


def errors(method: str, paths: list[torch.Tensor]) -> list[float]:
    """|sample - exact flow| of N(MEAN, STD^2), whose flow keeps the standard score."""
    x_T = torch.tensor([1.0], dtype=F64)
    result = []
    for path in paths:
        std_T, std_0 = ((STD**2 * level + 1 - level).sqrt() for level in (path[0], path[-1]))
        exact = path[-1].sqrt() * MEAN + std_0 / std_T * (x_T - path[0].sqrt() * MEAN)
        result.append((sample(gaussian_mean, x_T, path, method=method) - exact).abs().item())
    return result


@pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("dpm++", 2)])
def test_order_of_convergence(method, order):
    """Between log-SNR -6 and 6 in even steps, where the theory's assumptions hold."""
    coarse, fine = errors(method, [torch.sigmoid(torch.linspace(-6, 6, n + 1, dtype=F64)) for n in (64, 256)])
    assert math.log(coarse / fine) / math.log(4) == pytest.approx(order, abs=0.05)


@pytest.mark.parametrize("method", ["ddim", "dpm++"])
def test_order_from_pure_noise(method):
    """The first-order first step from pure noise does not spoil the second order of the rest."""
    paths = [alpha_bar("cosine", torch.linspace(1, 0.1, n + 1, dtype=F64)) for n in (64, 256)]
    coarse, fine = errors(method, paths)
    slope = math.log(coarse / fine) / math.log(4)
    assert slope == pytest.approx(1, abs=0.05) if method == "ddim" else slope > 1.9


def test_second_order_pays_at_equal_calls():
    ddim, solver = (errors(method, [levels("cosine", 20)])[0] for method in ("ddim", "dpm++"))
    assert solver < ddim / 5


def test_dpm_solver_step_by_hand():
    """Lu et al. 2022, algorithm 2, written with alpha, sigma and lambda as there, from an inner level."""
    path = torch.tensor([0.1, 0.3, 0.6], dtype=F64)
    (a0, a1, a2), (s0, s1, s2) = path.sqrt().tolist(), (1 - path).sqrt().tolist()
    x_T = normal(5)
    first = gaussian_mean(x_T, path[0])
    h1, h2 = math.log(a1 / s1) - math.log(a0 / s0), math.log(a2 / s2) - math.log(a1 / s1)
    x_1 = s1 / s0 * x_T - a1 * math.expm1(-h1) * first
    second = gaussian_mean(x_1, path[1])
    r = h1 / h2
    x_2 = s2 / s1 * x_1 - a2 * math.expm1(-h2) * ((1 + 1 / (2 * r)) * second - 1 / (2 * r) * first)
    torch.testing.assert_close(sample(gaussian_mean, x_T, path, method="dpm++"), x_2, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_result_is_the_denoisers_last_answer(method, steps):
    answers = []

    def denoise(x_t, alpha_bar_t):
        answers.append(gaussian_mean(x_t, alpha_bar_t))
        return answers[-1]

    x = sample(denoise, normal(6), levels("linear", steps), method=method, noise=noise_of((6,)))
    assert len(answers) == steps
    assert x.isfinite().all()
    torch.testing.assert_close(x, answers[-1], rtol=1e-14, atol=1e-15)


def test_denoiser_sees_the_levels_in_the_type_of_x():
    path, seen, done = levels("sigmoid", 4), [], []

    def denoise(x_t, alpha_bar_t):
        seen.append(alpha_bar_t)
        return 0.3 * x_t

    sample(denoise, normal(2, 3).float(), path, progress=lambda *step: done.append(step))
    torch.testing.assert_close(torch.stack(seen), path[:-1].float())
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("method", METHODS)
def test_a_denoiser_under_autocast_does_not_coarsen_the_path(method):
    x_T, path = normal(20).float(), levels("linear", 4)
    coarse = sample(lambda x, level: (0.3 * x).bfloat16(), x_T, path, method=method, noise=noise_of((20,)))
    rounded = sample(lambda x, level: (0.3 * x).bfloat16().float(), x_T, path, method=method, noise=noise_of((20,)))
    assert coarse.dtype == torch.float32
    assert torch.equal(coarse, rounded)


def test_fully_stochastic_ddim_is_ancestral():
    x_t, x_0, noise = normal(2, 3), normal(2, 3, seed=1), normal(2, 3, seed=2)
    for t, s in [(0.0, 0.4), (0.2, 0.3), (0.2, 0.99), (0.5, 1.0)]:
        pair = torch.tensor(t, dtype=F64), torch.tensor(s, dtype=F64)
        ancestral = ancestral_step(x_t, x_0, *pair, noise)
        torch.testing.assert_close(ddim_step(x_t, x_0, *pair, noise, eta=1.0), ancestral)
        torch.testing.assert_close(ddim_step(x_t, x_0, *pair, noise, eta=0.0), ddim_step(x_t, x_0, *pair))


def test_eta_and_the_noise_of_every_step_reach_the_step():
    x_T, path, asked = normal(5), levels("cosine", 4), []

    def noise(step):
        asked.append(step)
        return normal(5, seed=100 + step)

    ancestral = sample(gaussian_mean, x_T, path, method="ddpm", noise=noise)
    assert asked == [0, 1, 2, 3]
    torch.testing.assert_close(sample(gaussian_mean, x_T, path, eta=1.0, noise=noise), ancestral)
    by_hand = x_T
    for i, (t, s) in enumerate(pairwise(path)):
        by_hand = ddim_step(by_hand, gaussian_mean(by_hand, t), t, s, normal(5, seed=100 + i), eta=0.5)
    torch.testing.assert_close(sample(gaussian_mean, x_T, path, eta=0.5, noise=noise), by_hand)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_keeps_the_forward_law(eta):
    """From a true x_t and x_0, x_s has the mean and variance of q(x_s | x_0), whatever eta (DDIM, lemma 1)."""
    n, x_0 = 100_000, torch.full((100_000,), 0.7, dtype=F64)
    t, s = torch.tensor(0.2, dtype=F64), torch.tensor(0.6, dtype=F64)
    x_t = t.sqrt() * x_0 + (1 - t).sqrt() * normal(n)
    x_s = ddim_step(x_t, x_0, t, s, normal(n, seed=1), eta)
    assert x_s.mean().item() == pytest.approx(math.sqrt(0.6) * 0.7, abs=4 * math.sqrt(0.4 / n))
    assert x_s.var().item() == pytest.approx(0.4, abs=4 * 0.4 * math.sqrt(2 / n))
    overlap = torch.corrcoef(torch.stack([x_t, x_s]))[0, 1].item()
    snr_ratio = 0.2 * 0.4 / (0.6 * 0.8)
    assert overlap == pytest.approx(math.sqrt(1 - eta**2 * (1 - snr_ratio)), abs=4 / math.sqrt(n))


@pytest.mark.parametrize(("method", "eta"), [("ddim", 0.0), ("ddim", 0.5), ("ddpm", 0.0), ("dpm++", 0.0)])
@pytest.mark.parametrize("space", [(5, 3), (3, 5, 2)])
def test_an_item_does_not_depend_on_its_batch(method, eta, space):
    shape = (7, 2, *space)
    x_T, path = normal(*shape).float(), levels("cosine", 6)

    def draw(items):
        return lambda step: normal(*shape, seed=100 + step).float()[items]

    def denoise(x_t, alpha_bar_t):
        return (x_t * (1 + alpha_bar_t)).clamp(-0.5, 0.5)

    together = sample(denoise, x_T, path, method=method, eta=eta, noise=draw(slice(None)))
    for items in (slice(0, 1), slice(2, 5), slice(6, 7)):
        alone = sample(denoise, x_T[items], path, method=method, eta=eta, noise=draw(items))
        assert torch.equal(alone, together[items])
    assert not torch.equal(together[0], together[1])


def test_the_same_noise_gives_the_same_sample_and_another_another():
    x_T, path = normal(3, 4), levels("cosine", 5)
    once, again = (sample(gaussian_mean, x_T, path, method="ddpm", noise=noise_of((3, 4))) for _ in range(2))
    other = sample(gaussian_mean, x_T, path, method="ddpm", noise=lambda step: normal(3, 4, seed=900 + step))
    assert torch.equal(once, again)
    assert not torch.allclose(once, other)


def test_what_is_missing_unknown_or_out_of_order():
    x_T, path = normal(2), levels("cosine", 3)
    for options in ({"method": "ddpm"}, {"eta": 0.5}):
        with pytest.raises(ValueError, match="pass noise"):
            sample(gaussian_mean, x_T, path, **options)
    with pytest.raises(ValueError, match=r"'euler'.*ddim"):
        sample(gaussian_mean, x_T, path, method="euler")
    with pytest.raises(ValueError, match="rise from noise to clean"):
        sample(gaussian_mean, x_T, path.flip(0))
