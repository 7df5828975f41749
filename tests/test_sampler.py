"""The steps and the loop of the samplers; test_samplers_known_laws.py has the laws that they must return."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from known_laws import F64, gaussian_mean, normal

from medseg_diff.diffusion.process import add_noise, noise_from_x0, posterior, step_variance
from medseg_diff.diffusion.sampler import METHODS, ancestral_step, clip, ddim_step, dynamic_threshold, sample
from medseg_diff.diffusion.schedule import levels


def noise_of(shape: tuple[int, ...]):
    return lambda step: normal(*shape, seed=100 + step)


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


def test_sde_dpm_solver_step_by_hand():
    """Lu et al. 2022, SDE-DPM-Solver++(2M): the noise that is kept shrinks by e^-h more, and fresh noise fills up."""
    path = torch.tensor([0.1, 0.3, 0.6], dtype=F64)
    (a0, a1, a2), (s0, s1, s2) = path.sqrt().tolist(), (1 - path).sqrt().tolist()
    x_T, noise = normal(5), noise_of((5,))
    first = gaussian_mean(x_T, path[0])
    h1, h2 = math.log(a1 / s1) - math.log(a0 / s0), math.log(a2 / s2) - math.log(a1 / s1)
    x_1 = (
        s1 / s0 * math.exp(-h1) * x_T
        - a1 * math.expm1(-2 * h1) * first
        + s1 * math.sqrt(-math.expm1(-2 * h1)) * noise(0)
    )
    second = gaussian_mean(x_1, path[1])
    ahead = second + h2 / h1 / 2 * (second - first)
    x_2 = (
        s2 / s1 * math.exp(-h2) * x_1
        - a2 * math.expm1(-2 * h2) * ahead
        + s2 * math.sqrt(-math.expm1(-2 * h2)) * noise(1)
    )
    x = sample(gaussian_mean, x_T, path, method="dpm++sde", noise=noise)
    torch.testing.assert_close(x, x_2, rtol=1e-12, atol=1e-14)


def test_heun_step_by_hand():
    """EDM, algorithm 1, written with y = x / sqrt(alpha_bar) and sigma as there; Euler alone to clean."""
    path = torch.tensor([0.1, 0.4, 1.0], dtype=F64)
    scale, sigma = path.sqrt(), ((1 - path) / path).sqrt()
    x_T = normal(5)
    y = x_T / scale[0]
    slope = (y - gaussian_mean(x_T, path[0])) / sigma[0]
    euler = y + (sigma[1] - sigma[0]) * slope
    slope_ahead = (euler - gaussian_mean(scale[1] * euler, path[1])) / sigma[1]
    y = y + (sigma[1] - sigma[0]) * (slope + slope_ahead) / 2
    expected = gaussian_mean(scale[1] * y, path[1])
    torch.testing.assert_close(sample(gaussian_mean, x_T, path, method="heun"), expected, rtol=1e-12, atol=1e-14)


def test_first_order_steps_are_their_neighbours():
    """With one inner level: nothing to extrapolate from, so 2M is DDIM and its SDE ancestral."""
    x_T, path, noise = normal(5), torch.tensor([0.1, 0.6], dtype=F64), noise_of((5,))
    ddim, ancestral = (sample(gaussian_mean, x_T, path, method=method, noise=noise) for method in ("ddim", "ddpm"))
    assert torch.equal(sample(gaussian_mean, x_T, path, method="dpm++"), ddim)
    assert torch.equal(sample(gaussian_mean, x_T, path, method="dpm++sde", noise=noise), ancestral)
    path[0] = 0  # from pure noise sigma is infinite
    ddim = sample(gaussian_mean, x_T, path, method="ddim")
    assert torch.equal(sample(gaussian_mean, x_T, path, method="heun"), ddim)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_variance_reaches_the_ancestral_step(variance):
    x_T, path, noise = normal(5), levels("cosine", 3), noise_of((5,))
    by_hand = x_T
    for i, (t, s) in enumerate(pairwise(path)):
        mean, _ = posterior(by_hand, gaussian_mean(by_hand, t), t, s)
        by_hand = mean + step_variance(variance, by_hand, t, s).sqrt() * noise(i)
    x = sample(gaussian_mean, x_T, path, method="ddpm", variance=variance, noise=noise)
    torch.testing.assert_close(x, by_hand, rtol=1e-12, atol=1e-14)


def test_a_denoisers_fraction_is_the_learned_variance():
    x_T, path, noise = normal(5), levels("cosine", 3), noise_of((5,))
    for fraction, variance in ((0.0, "small"), (1.0, "large")):

        def denoise(x_t, alpha_bar_t, fraction=fraction):
            return gaussian_mean(x_t, alpha_bar_t), torch.full_like(x_t, fraction)

        fixed = sample(gaussian_mean, x_T, path, method="ddpm", variance=variance, noise=noise)
        torch.testing.assert_close(sample(denoise, x_T, path, method="ddpm", noise=noise), fixed)
        without = sample(gaussian_mean, x_T, path)
        assert torch.equal(sample(denoise, x_T, path), without)  # the other methods have no use for it


@pytest.mark.parametrize("method", METHODS)
def test_every_estimate_is_limited(method):
    seen, x_T = [], 3 * normal(50)
    path = levels("cosine", 6)
    x = sample(
        gaussian_mean,
        x_T,
        path,
        method=method,
        noise=noise_of((50,)),
        limit=partial(clip, bound=0.4),
        watch=lambda x_s, x_0, alpha_bar_s: seen.append(x_0),
    )
    by_hand = sample(
        lambda x_t, t: gaussian_mean(x_t, t).clamp(-0.4, 0.4), x_T, path, method=method, noise=noise_of((50,))
    )
    assert torch.equal(x, by_hand)
    assert all(x_0.abs().max() <= 0.4 for x_0 in seen)
    assert max(x_0.abs().max() for x_0 in seen) == 0.4  # it had something to do


def test_clip_and_dynamic_threshold_by_hand():
    x_0 = torch.arange(1, 201, dtype=F64) / 100  # 0.01 ... 2.00
    items = torch.stack([x_0, -x_0, x_0 / 4]).reshape(3, 1, 20, 10)
    assert torch.equal(clip(items, 0.5), items.clamp(-0.5, 0.5))
    limited = dynamic_threshold(items, 0.5, 0.988)  # the 198th of 200 magnitudes is 1.98
    torch.testing.assert_close(limited[0], items[0].clamp(max=1.98) / 1.98 * 0.5)
    torch.testing.assert_close(limited[1], -limited[0])
    torch.testing.assert_close(limited[2], items[2])  # within the bound it is left alone
    assert limited.abs().max() == 0.5
    torch.testing.assert_close(dynamic_threshold(items, 1.0, 0.0), items.clamp(-1, 1))


def test_watch_sees_every_state_the_estimate_and_its_level():
    x_T, path, seen = normal(5), levels("cosine", 4), []
    x = sample(gaussian_mean, x_T, path, watch=lambda *step: seen.append(step))
    assert [step[2].item() for step in seen] == path[1:].tolist()
    assert torch.equal(seen[-1][0], x)
    before = x_T
    for (x_s, x_0, alpha_bar_s), alpha_bar_t in zip(seen, path, strict=False):
        assert torch.equal(x_0, gaussian_mean(before, alpha_bar_t))
        assert torch.equal(x_s, add_noise(x_0, noise_from_x0(before, x_0, alpha_bar_t), alpha_bar_s))
        before = x_s


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_result_is_the_denoisers_last_answer(method, steps):
    answers = []

    def denoise(x_t, alpha_bar_t):
        answers.append(gaussian_mean(x_t, alpha_bar_t))
        return answers[-1]

    x = sample(denoise, normal(6), levels("linear", steps), method=method, noise=noise_of((6,)))
    assert len(answers) == (max(2 * steps - 2, 1) if method == "heun" else steps)
    assert x.isfinite().all()
    torch.testing.assert_close(x, answers[-1], rtol=1e-14, atol=1e-15)


def test_denoiser_sees_the_levels_as_they_are():
    path, seen = levels("sigmoid", 4), []

    def denoise(x_t, alpha_bar_t):
        seen.append(alpha_bar_t)
        return 0.3 * x_t

    sample(denoise, normal(2, 3).float(), path)
    assert torch.equal(torch.stack(seen), path[:-1])


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
    assert asked == [0, 1, 2]  # and none for the last step, which ends at clean
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


@pytest.mark.parametrize(("method", "eta"), [("ddim", 0.5), *((method, 0.0) for method in METHODS)])
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
    for options in ({"method": "ddpm"}, {"method": "dpm++sde"}, {"eta": 0.5}):
        with pytest.raises(ValueError, match="pass noise"):
            sample(gaussian_mean, x_T, path, **options)
    with pytest.raises(ValueError, match=r"'euler'.*ddim"):
        sample(gaussian_mean, x_T, path, method="euler")
    for variance, message in (("middle", r"'middle'.*large"), ("learned", r"return \(x_0, fraction\)")):
        with pytest.raises(ValueError, match=message):
            sample(gaussian_mean, x_T, path, method="ddpm", variance=variance, noise=noise_of((2,)))
    with pytest.raises(ValueError, match="rise from noise to clean"):
        sample(gaussian_mean, x_T, path.flip(0))
