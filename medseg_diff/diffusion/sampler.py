"""Samplers: from noise to a mask along a path of noise levels, given a denoiser that estimates x_0."""

from collections.abc import Callable
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor

from medseg_diff.diffusion.process import Level, add_noise, noise_from_x0, posterior
from medseg_diff.diffusion.schedule import log_snr

METHODS = ("ddim", "ddpm", "dpm++")

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(x_t, alpha_bar_t) -> an estimate or a draw of x_0; alpha_bar_t is a scalar of x_t's type and device."""


def sample(
    denoise: Denoiser,
    x_T: Float[Tensor, "batch *rest"],
    levels: Float[Tensor, "levels"],
    *,
    method: str = "ddim",
    eta: float = 0.0,
    noise: Callable[[int], Tensor] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Float[Tensor, "batch *rest"]:
    """Follow the path from x_T at levels[0] to levels[-1], one call of the denoiser a step; x at the last level.

    levels are alpha_bars, rising from noise (0 is pure noise) to clean; where the last is 1, the result is the
    denoiser's last answer itself. In one step from 0 to 1 every method returns denoise(x_T, 0).

    - "ddim": `ddim_step`, deterministic unless eta > 0.
    - "ddpm": `ancestral_step`.
    - "dpm++": DPM-Solver++(2M), deterministic, second order but for its first and last step (Lu et al. 2022, alg. 2).

    noise(i) gives the standard normal noise of step i = 0, 1, ...; only "ddpm" and eta > 0 ask for it. It may be drawn
    on another device. An item's result depends on its own x_T and noises, not on its batch, if the denoiser's does.
    progress(done, total) is called after every step. Raises ValueError for what is missing, unknown or out of order.
    """
    if (levels.diff() <= 0).any():
        raise ValueError(f"noise levels must rise from noise to clean, not {levels.tolist()}")
    x, earlier = x_T, None
    for i, (alpha_bar_t, alpha_bar_s) in enumerate(pairwise(levels)):
        x_0 = denoise(x, alpha_bar_t.to(x)).to(x)
        match method:
            case "ddim":
                x = ddim_step(x, x_0, alpha_bar_t, alpha_bar_s, _draw(noise, i, x) if eta else None, eta)
            case "ddpm":
                x = ancestral_step(x, x_0, alpha_bar_t, alpha_bar_s, _draw(noise, i, x))
            case "dpm++":
                x = ddim_step(x, _extrapolate(x_0, alpha_bar_t, alpha_bar_s, earlier), alpha_bar_t, alpha_bar_s)
            case _:
                raise ValueError(f"unknown sampler {method!r}; choose one of {', '.join(METHODS)}")
        earlier = x_0, alpha_bar_t
        if progress:
            progress(i + 1, len(levels) - 1)
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
    noise: Float[Tensor, "batch *rest"],
) -> Float[Tensor, "batch *rest"]:
    """A draw of q(x_s | x_t, x_0) at the cleaner level s (DDPM, Ho et al. 2020, eq. 6 and algorithm 2).

    Over any spacing it is exact where x_0 is a draw given x_t; where x_0 is the mean, only in the limit of many steps.
    """
    mean, variance = posterior(x_t, x_0, alpha_bar_t, alpha_bar_s)
    return mean + variance.sqrt() * noise


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


def _draw(noise: Callable[[int], Tensor] | None, step: int, x: Tensor) -> Tensor:
    if noise is None:
        raise ValueError("this sampler draws noise at every step: pass noise, or choose ddim with eta = 0, or dpm++")
    return noise(step).to(x)
