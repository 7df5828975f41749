"""Samplers: from noise to a mask along a path of noise levels, given a denoiser that estimates x_0."""

import math
from collections.abc import Callable
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor

from medseg_diff.diffusion.process import Level, add_noise, noise_from_x0, posterior, step_variance
from medseg_diff.diffusion.schedule import log_snr

METHODS = ("ddpm", "ddim", "dpm++", "dpm++sde", "heun")

Denoiser = Callable[[Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]
"""(x_t, alpha_bar_t) -> an estimate or a draw of x_0; alpha_bar_t is a scalar of the path's type, on x_t's device.

A pair is x_0 and the fraction of the learned variance (`step_variance`), which "ddpm" then takes.
"""


def sample(
    denoise: Denoiser,
    x_T: Float[Tensor, "batch *rest"],
    levels: Float[Tensor, "levels"],
    *,
    method: str = "ddim",
    eta: float = 0.0,
    variance: str = "small",
    limit: Callable[[Tensor], Tensor] | None = None,
    noise: Callable[[int], Tensor] | None = None,
    watch: Callable[[Tensor, Tensor, Tensor], object] | None = None,
) -> Float[Tensor, "batch *rest"]:
    """Follow the path from x_T at levels[0] to levels[-1], x at the last level.

    levels are alpha_bars, rising from noise (0 is pure noise) to clean; where the last is 1, the result is the
    denoiser's last answer itself. In one step from 0 to 1 every method returns denoise(x_T, 0). It is called once a
    step, but for "heun".

    - "ddpm": `ancestral_step` with `variance`.
    - "ddim": `ddim_step`, deterministic unless eta > 0.
    - "dpm++": DPM-Solver++(2M), deterministic, second order but for its first and last step (Lu et al. 2022, alg. 2).
    - "dpm++sde": SDE-DPM-Solver++(2M) of the same paper: `ancestral_step` with the x_0 that "dpm++" takes.
    - "heun": EDM's solver without churn, deterministic, second order (Karras et al. 2022, alg. 1), for two calls a
      step; one where the step starts at pure noise or ends at clean.

    limit is applied to every estimate of x_0, as `clip` and `dynamic_threshold` by functools.partial.
    noise(i) gives the standard normal noise of step i = 0, 1, ...; only "ddpm", "dpm++sde" and "ddim" with eta > 0 ask
    for it, and not where the step ends at clean. It may be drawn on another device. An item's result depends on its
    own x_T and noises, not on its batch, if the denoiser's does. watch(x_s, x_0, alpha_bar_s) sees, after every step,
    where it led and the estimate that it began with. Raises ValueError for what is missing, unknown or out of order.
    """
    if (levels.diff() <= 0).any():
        raise ValueError(f"noise levels must rise from noise to clean, not {levels.tolist()}")

    def estimate(x_t: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor | None]:
        answer = denoise(x_t, alpha_bar.to(x_t.device))
        x_0, fraction = (part.to(x_t) for part in answer) if isinstance(answer, tuple) else (answer.to(x_t), None)
        return limit(x_0) if limit else x_0, fraction

    x, earlier = x_T, None
    for i, (alpha_bar_t, alpha_bar_s) in enumerate(pairwise(levels)):
        x_0, fraction = estimate(x, alpha_bar_t)
        random = method in ("ddpm", "dpm++sde") or (method == "ddim" and eta > 0)
        z = _draw(noise, i, x) if random and alpha_bar_s < 1 else None
        match method:
            case "ddpm":
                kind = variance if fraction is None else "learned"
                x = ancestral_step(x, x_0, alpha_bar_t, alpha_bar_s, z, kind, fraction)
            case "ddim":
                x = ddim_step(x, x_0, alpha_bar_t, alpha_bar_s, z, eta)
            case "dpm++":
                x = ddim_step(x, _extrapolate(x_0, alpha_bar_t, alpha_bar_s, earlier), alpha_bar_t, alpha_bar_s)
            case "dpm++sde":
                ahead = _extrapolate(x_0, alpha_bar_t, alpha_bar_s, earlier)
                x = ancestral_step(x, ahead, alpha_bar_t, alpha_bar_s, z)
            case "heun":
                x_s = ddim_step(x, x_0, alpha_bar_t, alpha_bar_s)
                if alpha_bar_t > 0 and alpha_bar_s < 1:
                    both = _average(x_0, estimate(x_s, alpha_bar_s)[0], alpha_bar_t, alpha_bar_s)
                    x_s = ddim_step(x, both, alpha_bar_t, alpha_bar_s)
                x = x_s
            case _:
                raise ValueError(f"unknown sampler {method!r}; choose one of {', '.join(METHODS)}")
        earlier = x_0, alpha_bar_t
        if watch:
            watch(x, x_0, alpha_bar_s)
    return x


def ddim_step(
    x_t: Float[Tensor, "batch *rest"],
    x_0: Float[Tensor, "batch *rest"],
    alpha_bar_t: Level,
    alpha_bar_s: Level,
    noise: Float[Tensor, "batch *rest"] | None = None,
    eta: float = 0.0,
) -> Float[Tensor, "batch *rest"]:
    """From level t to the cleaner level s (DDIM, Song et al. 2020, eq. 12): x_0 with the noise that x_t holds.

    eta in [0, 1] replaces a part of that noise by a fresh one (eq. 16); with eta = 1 it is `ancestral_step`.
    """
    kept = noise_from_x0(x_t, x_0, alpha_bar_t)
    if noise is not None:
        snr_ratio = alpha_bar_t * (1 - alpha_bar_s) / (alpha_bar_s * (1 - alpha_bar_t))
        kept = add_noise(kept, noise, 1 - eta**2 * (1 - snr_ratio))
    return add_noise(x_0, kept, alpha_bar_s)


def ancestral_step(
    x_t: Float[Tensor, "batch *rest"],
    x_0: Float[Tensor, "batch *rest"],
    alpha_bar_t: Level,
    alpha_bar_s: Level,
    noise: Float[Tensor, "batch *rest"] | None,
    variance: str = "small",
    fraction: Float[Tensor, "batch *rest"] | None = None,
) -> Float[Tensor, "batch *rest"]:
    """A draw at the cleaner level s: q(x_s | x_t, x_0) with `step_variance` (DDPM, Ho et al. 2020, alg. 2).

    With the small variance it is exact, over any spacing, where x_0 is a draw given x_t; where x_0 is the mean, only in
    the limit of many steps. Without noise it is the mean.
    """
    mean, _ = posterior(x_t, x_0, alpha_bar_t, alpha_bar_s)
    if noise is None:
        return mean
    return mean + step_variance(variance, x_t, alpha_bar_t, alpha_bar_s, fraction).sqrt() * noise


def clip(x_0: Float[Tensor, "batch *rest"], bound: float) -> Float[Tensor, "batch *rest"]:
    """x_0 clamped to [-bound, bound]."""
    return x_0.clamp(-bound, bound)


def dynamic_threshold(
    x_0: Float[Tensor, "batch *rest"], bound: float, quantile: float = 0.995
) -> Float[Tensor, "batch *rest"]:
    """Each item clamped at the quantile of its magnitudes, then shrunk to [-bound, bound] (Saharia et al. 2022, 2.3).

    Items whose quantile lies within the bound are only clamped to it.
    """
    magnitudes = x_0.abs().reshape(len(x_0), -1).sort(1).values  # torch.quantile refuses large volumes
    rank = max(math.ceil(quantile * magnitudes.shape[1]), 1) - 1
    largest = magnitudes[:, rank].clamp_min(bound).reshape(-1, *(1,) * (x_0.ndim - 1))
    return x_0.clamp(-largest, largest) * (bound / largest)


def _extrapolate(
    x_0: Tensor, alpha_bar_t: Tensor, alpha_bar_s: Tensor, earlier: tuple[Tensor, Tensor] | None
) -> Tensor:
    """x_0 half-way to level s, along the line in log-SNR through the last two estimates; then a DDIM step is 2M's.

    An earlier estimate at pure noise is infinitely far and gets no weight; towards clean the line would not end, and
    x_0 itself is taken.
    """
    if earlier is None or alpha_bar_s == 1:
        return x_0
    x_0_before, alpha_bar_before = earlier
    ahead = log_snr(alpha_bar_s) - log_snr(alpha_bar_t)
    behind = log_snr(alpha_bar_t) - log_snr(alpha_bar_before)
    return x_0 + (ahead / behind / 2).to(x_0) * (x_0 - x_0_before)


def _average(x_0: Tensor, x_0_ahead: Tensor, alpha_bar_t: Tensor, alpha_bar_s: Tensor) -> Tensor:
    """The x_0 with which a DDIM step follows the mean of the slopes at t and s, in sigma = sqrt((1 - abar) / abar)."""
    ratio = ((log_snr(alpha_bar_s) - log_snr(alpha_bar_t)) / 2).exp()  # sigma_t / sigma_s
    return x_0 + (ratio / 2).to(x_0) * (x_0_ahead - x_0)


def _draw(noise: Callable[[int], Tensor] | None, step: int, x: Tensor) -> Tensor:
    if noise is None:
        raise ValueError(
            "this sampler draws noise at every step: pass noise, or choose ddim with eta = 0, dpm++ or heun"
        )
    return noise(step).to(x)
