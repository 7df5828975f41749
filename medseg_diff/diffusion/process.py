"""The diffusion process between the mask x_0 and pure noise, as pure functions.

A noise level is named by its alpha_bar: one number for all, or one a batch item. It is always passed in, never looked
up from a step's index, so a step between any two levels is right, however they are spaced. Everything is
elementwise over space: 2D, 3D and plain vectors run the same code. The coefficients are computed in the type of
alpha_bar and rounded to the type of x last: float64 levels cost nothing and keep 1 - alpha_bar exact near clean.
"""

import torch
from jaxtyping import Float
from torch import Tensor

Level = Float[Tensor, ""] | Float[Tensor, "batch"]

PREDICTIONS = ("noise", "x0", "velocity")
"""What a network may predict: each says all, with x_t, but the noise at pure noise and x_0 at clean."""

VARIANCES = ("small", "large", "learned")


def add_noise(
    x_0: Float[Tensor, "batch *rest"], noise: Float[Tensor, "batch *rest"], alpha_bar: Level
) -> Float[Tensor, "batch *rest"]:
    """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise (DDPM, Ho et al. 2020, eq. 4).

    Note the square roots: tutorials that multiply by alpha_bar itself do not keep the variance.
    """
    return _like(alpha_bar.sqrt(), x_0) * x_0 + _like((1 - alpha_bar).sqrt(), x_0) * noise


def forward_chain(
    x_0: Float[Tensor, "batch *rest"], betas: Float[Tensor, "steps"], generator: torch.Generator | None = None
) -> tuple[Float[Tensor, "steps batch *rest"], Float[Tensor, "steps batch *rest"]]:
    """x_1 ... x_T, noised step by step (DDPM, eq. 2), and the noises that were added.

    The teaching twin of `add_noise`: the same law in T steps. The generator lives on the device of x_0.
    """
    noises = torch.randn((len(betas), *x_0.shape), generator=generator, dtype=x_0.dtype, device=x_0.device)
    return _walk(x_0, noises, betas), noises


def equivalent_noise(
    noises: Float[Tensor, "steps batch *rest"], betas: Float[Tensor, "steps"]
) -> Float[Tensor, "steps batch *rest"]:
    """At every step the one standard normal noise with which `add_noise` gives the chain's x_t.

    It is what the chain makes of x_0 = 0, divided by sqrt(1 - alpha_bar_t).
    """
    deviations = (1 - (1 - betas).cumprod(0)).sqrt()
    merged = _walk(torch.zeros_like(noises[0]), noises, betas)
    return merged / _like(deviations, noises)


def posterior(
    x_t: Float[Tensor, "batch *rest"], x_0: Float[Tensor, "batch *rest"], alpha_bar_t: Level, alpha_bar_s: Level
) -> tuple[Float[Tensor, "batch *rest"], Float[Tensor, "#batch *#rest"]]:
    """Mean and variance of q(x_s | x_t, x_0) for any level s cleaner than t (DDPM, eq. 6 and 7).

    Between the two levels the forward process scales by sqrt(alpha_bar_t / alpha_bar_s) and adds the variance
    beta = 1 - alpha_bar_t / alpha_bar_s: the paper's alpha_t and beta_t where the levels are neighbours. At pure noise,
    alpha_bar_t = 0, x_t drops out. The variance has x's dimensions, of size 1 where it is constant.
    """
    beta = _beta(alpha_bar_t, alpha_bar_s)
    weight_0 = alpha_bar_s.sqrt() * beta / (1 - alpha_bar_t)
    weight_t = (alpha_bar_t / alpha_bar_s).sqrt() * (1 - alpha_bar_s) / (1 - alpha_bar_t)
    mean = _like(weight_0, x_0) * x_0 + _like(weight_t, x_t) * x_t
    return mean, step_variance("small", x_t, alpha_bar_t, alpha_bar_s)


def step_variance(
    variance: str,
    x_t: Float[Tensor, "batch *rest"],
    alpha_bar_t: Level,
    alpha_bar_s: Level,
    fraction: Float[Tensor, "batch *rest"] | None = None,
) -> Float[Tensor, "#batch *#rest"]:
    """The variance of a reverse step from level t to any cleaner level s, in x's dimensions as in `posterior`.

    - small: the posterior's (DDPM, eq. 7), right where x_0 is known.
    - large: beta, right where x_0 is standard normal.
    - learned: exp(v log large + (1 - v) log small), with v in [0, 1] the network's fraction (Nichol & Dhariwal 2021,
      eq. 15).

    From pure noise they are 1 - alpha_bar_s, 1 and between. At clean all are 0: the last step adds no noise. Raises
    ValueError for an unknown variance, or a learned one without its fraction.
    """
    large = _beta(alpha_bar_t, alpha_bar_s)
    small = large * (1 - alpha_bar_s) / (1 - alpha_bar_t)
    large = large.masked_fill(alpha_bar_s == 1, 0)
    match variance:
        case "small":
            return _like(small, x_t)
        case "large":
            return _like(large, x_t)
        case "learned" if fraction is not None:
            return _like(large, x_t) ** fraction * _like(small, x_t) ** (1 - fraction)
        case "learned":
            raise ValueError("the learned variance needs its fraction: let the denoiser return (x_0, fraction)")
    raise ValueError(f"unknown variance {variance!r}; choose one of {', '.join(VARIANCES)}")


def velocity(
    x_0: Float[Tensor, "batch *rest"], noise: Float[Tensor, "batch *rest"], alpha_bar: Level
) -> Float[Tensor, "batch *rest"]:
    """v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022, section 4)."""
    return _like(alpha_bar.sqrt(), x_0) * noise - _like((1 - alpha_bar).sqrt(), x_0) * x_0


def x0_from_velocity(
    x_t: Float[Tensor, "batch *rest"], v: Float[Tensor, "batch *rest"], alpha_bar: Level
) -> Float[Tensor, "batch *rest"]:
    """x_0 = sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v (Salimans & Ho 2022, appendix D); defined at every level."""
    return _like(alpha_bar.sqrt(), x_t) * x_t - _like((1 - alpha_bar).sqrt(), x_t) * v


def x0_from_noise(
    x_t: Float[Tensor, "batch *rest"], noise: Float[Tensor, "batch *rest"], alpha_bar: Level
) -> Float[Tensor, "batch *rest"]:
    """x_0 = (x_t - sqrt(1 - alpha_bar) noise) / sqrt(alpha_bar) (DDPM, eq. 15).

    Not finite at pure noise, where the noise says nothing about x_0: predict x_0 or v on zero-terminal schedules.
    """
    return (x_t - _like((1 - alpha_bar).sqrt(), x_t) * noise) / _like(alpha_bar.sqrt(), x_t)


def noise_from_x0(
    x_t: Float[Tensor, "batch *rest"], x_0: Float[Tensor, "batch *rest"], alpha_bar: Level
) -> Float[Tensor, "batch *rest"]:
    """noise = (x_t - sqrt(alpha_bar) x_0) / sqrt(1 - alpha_bar), the inverse of `add_noise`; 0 where there is none."""
    deviation = (1 - alpha_bar).sqrt().masked_fill(alpha_bar == 1, torch.inf)
    return (x_t - _like(alpha_bar.sqrt(), x_t) * x_0) / _like(deviation, x_t)


def noise_from_velocity(
    x_t: Float[Tensor, "batch *rest"], v: Float[Tensor, "batch *rest"], alpha_bar: Level
) -> Float[Tensor, "batch *rest"]:
    """noise = sqrt(1 - alpha_bar) x_t + sqrt(alpha_bar) v (Salimans & Ho 2022, appendix D); defined at every level."""
    return _like((1 - alpha_bar).sqrt(), x_t) * x_t + _like(alpha_bar.sqrt(), x_t) * v


def target(
    prediction: str, x_0: Float[Tensor, "batch *rest"], noise: Float[Tensor, "batch *rest"], alpha_bar: Level
) -> Float[Tensor, "batch *rest"]:
    """What a network that predicts `prediction` should answer. Raises ValueError for an unknown prediction."""
    match prediction:
        case "noise":
            return noise
        case "x0":
            return x_0
        case "velocity":
            return velocity(x_0, noise, alpha_bar)
    raise ValueError(unknown_prediction(prediction))


def x0_from(
    prediction: str, x_t: Float[Tensor, "batch *rest"], output: Float[Tensor, "batch *rest"], alpha_bar: Level
) -> Float[Tensor, "batch *rest"]:
    """The x_0 that a network's answer means; of "noise" not finite at pure noise. Raises ValueError as `target`."""
    match prediction:
        case "noise":
            return x0_from_noise(x_t, output, alpha_bar)
        case "x0":
            return output
        case "velocity":
            return x0_from_velocity(x_t, output, alpha_bar)
    raise ValueError(unknown_prediction(prediction))


def unknown_prediction(prediction: str) -> str:
    """The message about a prediction that is none of PREDICTIONS."""
    return f"unknown prediction {prediction!r}; choose one of {', '.join(PREDICTIONS)}"


def input_scale_wiener(alpha_bar: Level, b: float) -> Level:
    """The factor on x_t for a network's input: sqrt(alpha_bar) b / (alpha_bar b^2 + 1 - alpha_bar).

    It makes x_t the best linear estimate (Wiener 1949) of the mask in [-1, 1] of which x_0 is b times; 0 at pure noise.
    """
    return alpha_bar.sqrt() * b / (alpha_bar * b**2 + 1 - alpha_bar)


def _walk(x: Tensor, noises: Tensor, betas: Tensor) -> Tensor:
    path = torch.empty_like(noises)
    for i, (beta, noise) in enumerate(zip(betas, noises, strict=True)):
        x = path[i] = add_noise(x, noise, 1 - beta)
    return path


def _beta(alpha_bar_t: Tensor, alpha_bar_s: Tensor) -> Tensor:
    """1 - alpha_bar_t / alpha_bar_s, the variance that the forward process adds from s to t."""
    return (alpha_bar_s - alpha_bar_t) / alpha_bar_s


def _like(coefficient: Tensor, x: Tensor) -> Tensor:
    """The coefficient in x's type and on its device, along x's first dimension."""
    return coefficient.to(x).reshape(-1, *(1,) * (x.ndim - 1))
