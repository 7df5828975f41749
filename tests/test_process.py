import math

import pytest
import torch

from medseg_diff.diffusion.process import (
    PREDICTIONS,
    VARIANCES,
    add_noise,
    equivalent_noise,
    forward_chain,
    input_scale_wiener,
    noise_from_velocity,
    noise_from_x0,
    posterior,
    step_variance,
    target,
    velocity,
    x0_from,
    x0_from_noise,
    x0_from_velocity,
)
from medseg_diff.diffusion.schedule import KINDS, betas, discrete_alpha_bar, levels

F64 = torch.float64


def level(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=F64)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_add_noise_by_hand():
    x_t = add_noise(torch.tensor([2.0, -4.0]), torch.tensor([1.0, 1.0]), torch.tensor([0.25, 0.64]))
    torch.testing.assert_close(x_t, torch.tensor([0.5 * 2 + math.sqrt(0.75), 0.8 * -4 + 0.6]))


@pytest.mark.parametrize("space", [(), (3, 4), (2, 3, 4)])
def test_one_level_an_item_is_item_by_item(space):
    x_0, noise = normal(3, 2, *space), normal(3, 2, *space, seed=1)
    each = torch.tensor([0, 0.3, 1], dtype=F64)
    together = add_noise(x_0, noise, each)
    for i in range(3):
        assert torch.equal(together[i], add_noise(x_0[i : i + 1], noise[i : i + 1], each[i])[0])
    assert torch.equal(together[0], noise[0])
    assert torch.equal(together[2], x_0[2])


def test_float64_levels_keep_the_type_of_x():
    x, each = normal(2, 3).float(), torch.tensor([0.3, 0.6], dtype=F64)
    results = [add_noise(x, x, each), velocity(x, x, each), x0_from_velocity(x, x, each), noise_from_x0(x, x, each)]
    results += [x0_from_noise(x, x, each), *posterior(x, x, each, each + 0.1)]
    assert {result.dtype for result in results} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", [(3, 4), (2, 3, 2)])
@pytest.mark.parametrize("zero_terminal", [True, False])
def test_chain_and_closed_form_agree_at_every_step(kind, space, zero_terminal):
    x_0 = normal(2, 1, *space)
    alpha_bars = discrete_alpha_bar(kind, 1000, zero_terminal=zero_terminal)
    chain, noises = forward_chain(x_0, betas(alpha_bars), torch.Generator().manual_seed(1))
    merged = equivalent_noise(noises, betas(alpha_bars))
    assert chain.shape == noises.shape == merged.shape == (1000, 2, 1, *space)
    for x_t, noise, alpha_bar in zip(chain, merged, alpha_bars, strict=True):
        torch.testing.assert_close(add_noise(x_0, noise, alpha_bar), x_t, rtol=0, atol=1e-12)


def test_chain_by_hand():
    x_0 = normal(4)
    chain, noises = forward_chain(x_0, torch.tensor([0.36, 0.75], dtype=F64), torch.Generator().manual_seed(1))
    torch.testing.assert_close(chain[0], 0.8 * x_0 + 0.6 * noises[0])
    torch.testing.assert_close(chain[1], 0.5 * chain[0] + math.sqrt(0.75) * noises[1])
    assert not torch.equal(noises[0], noises[1])


def test_chain_is_the_generators():
    x_0, steps = normal(4), torch.full((3,), 0.1, dtype=F64)
    first, again, other = (forward_chain(x_0, steps, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_equivalent_noise_is_standard_normal():
    noises = normal(50, 40000)
    merged = equivalent_noise(noises, betas(discrete_alpha_bar("linear", 50)))
    torch.testing.assert_close(merged.var(1), torch.ones(50, dtype=F64), rtol=0, atol=5 * math.sqrt(2 / 40000))
    torch.testing.assert_close(merged.mean(1), torch.zeros(50, dtype=F64), rtol=0, atol=5 / math.sqrt(40000))


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize(("t", "s"), [(500, 501), (100, 200), (900, 990), (3, 998), (0, 1), (0, 500), (0, 999)])
def test_posterior_is_the_product_of_the_two_gaussians(kind, t, s):
    """By quadrature over x_s: q(x_s | x_0) q(x_t | x_s), for neighbours, respaced pairs and pure noise (t = 0)."""
    path = levels(kind, 1000)
    alpha_bar_t, alpha_bar_s = path[t], path[s]
    x_0, x_t = 0.7, -1.3
    prior_mean, prior_std = (alpha_bar_s.sqrt() * x_0).item(), (1 - alpha_bar_s).sqrt().item()
    x_s = torch.linspace(prior_mean - 12 * prior_std, prior_mean + 12 * prior_std, 200001, dtype=F64)
    ratio = alpha_bar_t / alpha_bar_s
    log_product = -((x_s - prior_mean) ** 2) / (2 * prior_std**2) - (x_t - ratio.sqrt() * x_s) ** 2 / (2 * (1 - ratio))
    weights = torch.softmax(log_product, 0)
    expected_mean = (weights * x_s).sum()
    expected_variance = (weights * (x_s - expected_mean) ** 2).sum()
    mean, variance = posterior(level(x_t)[None], level(x_0)[None], alpha_bar_t, alpha_bar_s)
    torch.testing.assert_close(mean[0], expected_mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(variance[0], expected_variance, rtol=1e-9, atol=0)


def test_posterior_at_the_ends():
    x_t, x_0 = normal(2, 3), normal(2, 3, seed=1)
    mean, variance = posterior(x_t, x_0, level(0.0), level(1.0))
    assert torch.equal(mean, x_0)
    assert variance.shape == (1, 1)
    assert variance.item() == 0
    mean, variance = posterior(x_t, x_0, torch.tensor([0, 0.5], dtype=F64), torch.tensor([0.5, 1], dtype=F64))
    torch.testing.assert_close(mean[0], math.sqrt(0.5) * x_0[0])
    torch.testing.assert_close(mean[1], x_0[1])
    torch.testing.assert_close(variance, torch.tensor([[0.5], [0]], dtype=F64))


@pytest.mark.parametrize("alpha_bar", [0.0, 1e-4, 0.3, 0.9999, 1.0])
@pytest.mark.parametrize("space", [(3, 4), (2, 3, 4)])
def test_velocity_gives_x0_back_at_every_level(alpha_bar, space):
    x_0, noise = normal(2, 3, *space), normal(2, 3, *space, seed=1)
    x_t = add_noise(x_0, noise, level(alpha_bar))
    v = velocity(x_0, noise, level(alpha_bar))
    torch.testing.assert_close(x0_from_velocity(x_t, v, level(alpha_bar)), x_0)
    assert torch.allclose(v, -x_0) == (alpha_bar == 0)
    assert torch.allclose(v, noise) == (alpha_bar == 1)


@pytest.mark.parametrize("alpha_bar", [1e-4, 0.3, 0.9999])
def test_noise_and_x0_give_each_other_back(alpha_bar):
    x_0, noise = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    x_t = add_noise(x_0, noise, level(alpha_bar))
    torch.testing.assert_close(x0_from_noise(x_t, noise, level(alpha_bar)), x_0)
    torch.testing.assert_close(noise_from_x0(x_t, x_0, level(alpha_bar)), noise)


def test_noise_from_x0_is_safe_at_clean_and_exact_at_noise():
    x_t, guess = normal(2, 3), normal(2, 3, seed=1).requires_grad_()
    noise = noise_from_x0(x_t, guess, torch.tensor([1, 0], dtype=F64))
    assert torch.equal(noise, torch.stack([torch.zeros(3, dtype=F64), x_t[1]]))
    noise.sum().backward()
    assert guess.grad.isfinite().all()


@pytest.mark.parametrize("alpha_bar", [0.0, 1e-4, 0.3, 0.9999, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_means_the_same(prediction, alpha_bar):
    """From what a network should answer, x_0 and the noise come back at every level where they are defined."""
    x_0, noise, each = normal(2, 3, 4), normal(2, 3, 4, seed=1), level(alpha_bar)
    x_t = add_noise(x_0, noise, each)
    answer = target(prediction, x_0, noise, each)
    expected = {"noise": noise, "x0": x_0, "velocity": math.sqrt(alpha_bar) * noise - math.sqrt(1 - alpha_bar) * x_0}
    torch.testing.assert_close(answer, expected[prediction], rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(noise_from_velocity(x_t, target("velocity", x_0, noise, each), each), noise)
    if prediction == "noise" and alpha_bar == 0:
        assert not x0_from(prediction, x_t, answer, each).isfinite().any()
        return
    x_0_again = x0_from(prediction, x_t, answer, each)
    torch.testing.assert_close(x_0_again, x_0)
    for other in PREDICTIONS:
        if alpha_bar < 1:  # at clean x_t says nothing about the noise
            again = target(other, x_0_again, noise_from_x0(x_t, x_0_again, each), each)
            torch.testing.assert_close(again, target(other, x_0, noise, each))


def test_one_level_an_item_of_every_prediction():
    x_0, noise, each = normal(2, 3), normal(2, 3, seed=1), torch.tensor([0.3, 0.6], dtype=F64)
    x_t = add_noise(x_0, noise, each)
    for prediction in PREDICTIONS:
        torch.testing.assert_close(x0_from(prediction, x_t, target(prediction, x_0, noise, each), each), x_0)


def test_unknown_prediction_and_variance_name_the_known_ones():
    x = normal(2, 3)
    for function in (target, x0_from):
        with pytest.raises(ValueError, match=r"'eps'.*velocity"):
            function("eps", x, x, level(0.5))
    with pytest.raises(ValueError, match=r"'middle'.*learned"):
        step_variance("middle", x, level(0.2), level(0.5))
    with pytest.raises(ValueError, match="needs its fraction"):
        step_variance("learned", x, level(0.2), level(0.5))


@pytest.mark.parametrize(("t", "s"), [(0.2, 0.3), (0.2, 0.99), (0.0, 0.4), (0.9998, 0.9999)])
def test_variances_between_any_two_levels(t, s):
    x, fraction = normal(2, 3), normal(2, 3, seed=1).sigmoid()
    small, large, learned = (step_variance(kind, x, level(t), level(s), fraction) for kind in VARIANCES)
    assert small.shape == large.shape == (1, 1)
    assert torch.equal(small, posterior(x, x, level(t), level(s))[1])
    torch.testing.assert_close(large, level(1 - t / s).reshape(1, 1), rtol=1e-11, atol=0)
    torch.testing.assert_close(learned, (fraction * large.log() + (1 - fraction) * small.log()).exp())
    for end, expected in ((0.0, small), (1.0, large)):
        torch.testing.assert_close(
            step_variance("learned", x, level(t), level(s), torch.full_like(x, end)), expected.expand_as(x)
        )


@pytest.mark.parametrize(("spread", "variance"), [(0.0, "small"), (1.0, "large")])
def test_small_and_large_are_right_for_a_known_and_a_standard_normal_x_0(spread, variance):
    """Var(x_s | x_t) of the joint Gaussian of x_0 ~ N(0, spread), x_s and x_t (DDPM, section 3.2)."""
    t, s = 0.3, 0.7
    var_s, var_t, cov = s * spread + 1 - s, t * spread + 1 - t, math.sqrt(t / s) * (s * spread + 1 - s)
    expected = var_s - cov**2 / var_t
    assert step_variance(variance, normal(1), level(t), level(s)).item() == pytest.approx(expected, rel=1e-12)


def test_no_variance_is_left_at_clean():
    x, fraction = normal(4, 3), torch.tensor([0, 0.3, 1, 0.5], dtype=F64)[:, None].repeat(1, 3).requires_grad_()
    t, s = torch.tensor([0.5, 0, 0.5, 0.5], dtype=F64), torch.tensor([1, 1, 1, 0.75], dtype=F64)
    for kind in VARIANCES:
        variance = step_variance(kind, x, t, s, fraction)
        assert not variance[:3].any()
        assert variance[3].all()
    variance.sum().backward()
    assert not fraction.grad[:3].any()
    assert fraction.grad[3].isfinite().all()


@pytest.mark.parametrize("b", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("alpha_bar", [0.0, 0.02, 0.5, 0.98])
def test_wiener_scale_is_the_regression_of_the_mask_on_x_t(b, alpha_bar):
    n = 200_000
    mask = normal(n).sign()
    x_t = add_noise(b * mask, normal(n, seed=1), level(alpha_bar))
    slope = (mask * x_t).sum() / (x_t**2).sum()
    residual = mask - slope * x_t
    standard_error = (residual.std() / (x_t.std() * math.sqrt(n))).item()
    assert input_scale_wiener(level(alpha_bar), b).item() == pytest.approx(slope.item(), abs=4 * standard_error)


def test_wiener_scale_at_the_ends():
    scale = input_scale_wiener(torch.tensor([0, 1], dtype=F64), 0.5)
    assert scale.tolist() == [0, 2]
