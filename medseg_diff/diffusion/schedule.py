"""Noise schedules: alpha_bar, the share of the signal's variance that is left at time t.

Time is continuous, 0 = clean and 1 = pure noise, so a schedule does not change when the number of steps does:
training and sampling read the same curve at the times they like. All functions keep the type of t, float64 too.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

KINDS = ("linear", "quadratic", "cosine", "sigmoid", "scaled_linear")

SPACINGS = ("trailing", "leading", "linspace", "log_snr")

DISCRETE_STEPS = 1000
"""The number of steps for which the published betas were chosen."""


def alpha_bar(
    kind: str, t: Float[Tensor, "*shape"], *, zero_terminal: bool = True, shift: float = 0.0
) -> Float[Tensor, "*shape"]:
    """The signal's share of the variance at time t in [0, 1]: exactly 1 at t = 0, falling.

    - linear: betas 1e-4 to 0.02, linear in t (Ho et al. 2020, section 4).
    - quadratic: the same ends, the square root of beta linear in t (the variant in the code of Ho et al.).
    - scaled_linear: as quadratic, from 0.00085 to 0.012 (Rombach et al. 2022).
    - sigmoid: betas 1e-4 to 0.02 along a sigmoid of [-6, 6] (Xu et al. 2022, GeoDiff).
    - cosine: f(t) / f(0), f(t) = cos^2((t + s) / (1 + s) pi / 2), s = 0.008 (Nichol & Dhariwal 2021, eq. 17).

    The kinds defined by 1000 discrete betas become beta(t) = 1000 beta and alpha_bar = exp(-integral of beta)
    (Song et al. 2021, eq. 29). The product of (1 - beta) over the discrete steps is smaller by a factor of about
    exp(-sum of beta^2 / 2): at most 9 %, at the noisy end, where alpha_bar itself is tiny.

    With zero_terminal the square root is shifted and scaled so that t = 1 is exactly 0 and t = 0 stays 1
    (Lin et al. 2024, algorithm 1, in continuous time).

    shift is added to the log-SNR; pure noise and clean stay exact. 2 log b does to data of scale 1 what a scale b of
    the data does without a shift (Chen 2023); -2 log b undoes such a scale. 2 log(reference / side) follows the
    resolution: the noise of an image of `side` pixels, averaged down to `reference` pixels, is then the reference's
    (Hoogeboom et al. 2023, simple diffusion, section 3.1). Raises ValueError for an unknown kind.
    """
    signal = _unscaled(kind, t)
    if zero_terminal:
        end = _unscaled(kind, torch.ones_like(t)).sqrt()
        signal = ((signal.sqrt() - end) / (1 - end)) ** 2
    amplified = math.exp(shift) * signal
    return amplified / (amplified + (1 - signal))


def discrete_alpha_bar(
    kind: str, steps: int, *, zero_terminal: bool = True, shift: float = 0.0
) -> Float[Tensor, "{steps}"]:
    """alpha_bar at t = i / steps for i = 1 ... steps, in float64."""
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    return alpha_bar(kind, t, zero_terminal=zero_terminal, shift=shift)


def betas(alpha_bars: Float[Tensor, "steps"]) -> Float[Tensor, "steps"]:
    """The variance that each step of the forward chain adds: 1 - alpha_bar_i / alpha_bar_(i-1), alpha_bar_0 = 1."""
    cleaner = torch.cat([alpha_bars.new_ones(1), alpha_bars[:-1]])
    return (cleaner - alpha_bars) / cleaner


def levels(
    kind: str,
    steps: int,
    *,
    spacing: str = "trailing",
    train_steps: int = 1000,
    zero_terminal: bool = True,
    shift: float = 0.0,
) -> Float[Tensor, "{steps}+1"]:
    """The sampler's path, in float64: alpha_bar at `steps` falling times and, last, 1 (clean).

    With N = train_steps, the spacings (Lin et al. 2024, table 2) take these times:

    - trailing: t = 1, 1 - 1/steps, ... 1/steps. Continuous: N does not matter.
    - leading: from t = 1/N upwards in strides of floor(N / steps) / N. It never starts at the noisiest level unless
      steps = N: there the sampler is told that pure noise holds some signal.
    - linspace: from t = 1 to t = 1/N, evenly, rounded to multiples of 1/N.
    - log_snr: evenly in log-SNR from t = 1 to t = 1/N. Where t = 1 is pure noise, whose log-SNR is not finite, that is
      the first level and the even ones start at t = 1 - 1/N.

    With one level to place, linspace takes the noisier end, and log_snr the middle behind pure noise. Raises
    ValueError for an unknown spacing, and for more steps than train_steps with leading and linspace.
    """
    if spacing in ("leading", "linspace") and steps > train_steps:
        raise ValueError(f"{spacing} spacing has {train_steps} levels to choose from, not {steps}; take trailing")

    def at(t: Tensor) -> Tensor:
        return alpha_bar(kind, t, zero_terminal=zero_terminal, shift=shift)

    match spacing:
        case "trailing":
            path = at(torch.arange(steps, 0, -1, dtype=torch.float64) / steps)
        case "leading":
            path = at((torch.arange(steps - 1, -1, -1) * (train_steps // steps) + 1).double() / train_steps)
        case "linspace":
            path = at((torch.linspace(train_steps - 1, 0, steps, dtype=torch.float64).round() + 1) / train_steps)
        case "log_snr":
            path = _even_log_snr(
                at(torch.tensor([1, 1 - 1 / train_steps, 1 / train_steps], dtype=torch.float64)), steps
            )
        case _:
            raise ValueError(f"unknown spacing {spacing!r}; choose one of {', '.join(SPACINGS)}")
    return torch.cat([path, path.new_ones(1)])


def log_snr(alpha_bar: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log(alpha_bar / (1 - alpha_bar)); infinite at pure noise and at clean."""
    return torch.logit(alpha_bar)


def _even_log_snr(ends: Float[Tensor, "3"], steps: int) -> Float[Tensor, "{steps}"]:
    """Levels even in log-SNR from the first end to the last; behind pure noise, from the second end."""
    pure, first = (1, ends[1]) if ends[0] == 0 else (0, ends[0])
    inner, (low, high) = steps - pure, log_snr(torch.stack([first, ends[2]])).tolist()
    low = (low + high) / 2 if inner == 1 and pure else low
    return torch.cat([ends[:pure], torch.linspace(low, high, inner, dtype=ends.dtype).sigmoid()])


def _unscaled(kind: str, t: Tensor) -> Tensor:
    match kind:
        case "linear":
            integral = 1e-4 * t + (0.02 - 1e-4) * t**2 / 2
        case "quadratic":
            integral = _integral_of_square(math.sqrt(1e-4), math.sqrt(0.02), t)
        case "scaled_linear":
            integral = _integral_of_square(math.sqrt(0.00085), math.sqrt(0.012), t)
        case "sigmoid":
            risen = functional.softplus(12 * t - 6) - functional.softplus(0 * t - 6)
            integral = 1e-4 * t + (0.02 - 1e-4) / 12 * risen
        case "cosine":
            return _squared_cosine(t) / _squared_cosine(torch.zeros_like(t))
        case _:
            raise ValueError(f"unknown schedule {kind!r}; choose one of {', '.join(KINDS)}")
    return torch.exp(-DISCRETE_STEPS * integral)


def _integral_of_square(first: float, last: float, t: Tensor) -> Tensor:
    """The integral from 0 to t of the square of a line from first to last; a polynomial, hence 0 at t = 0 exactly."""
    slope = last - first
    return first**2 * t + first * slope * t**2 + slope**2 * t**3 / 3


def _squared_cosine(t: Tensor) -> Tensor:
    """cos^2((t + s) / (1 + s) pi / 2), written as a sine of the time left, which is 0 at t = 1 exactly."""
    return torch.sin((1 - t) / (1 + 0.008) * (math.pi / 2)) ** 2
