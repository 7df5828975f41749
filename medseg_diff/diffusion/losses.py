"""How much the error at a noise level counts, and what teaches a learned variance."""

import torch
from jaxtyping import Float
from torch import Tensor

from medseg_diff.diffusion.process import Level, posterior, step_variance, unknown_prediction

WEIGHTINGS = ("uniform", "min_snr", "level")


def loss_weight(
    weighting: str, prediction: str, alpha_bar: Level, *, gamma: float = 5.0, data_std: float = 1.0
) -> Level:
    """The factor on the squared error of the network's own output, at every level.

    - uniform: 1.
    - min_snr: min(SNR, gamma) on the error of x_0 (Hang et al. 2023, eq. 7). At pure noise it is 0 for x0 and velocity:
      nothing is taught there.
    - level: SNR + 1 / data_std^2 on the error of x_0 (EDM, Karras et al. 2022, table 1: lambda(sigma)). Infinite for x0
      at clean and for noise at pure noise; for velocity with data_std = 1 it is 1, the same as uniform.

    The squared error of the noise is SNR times that of x_0, that of the velocity SNR + 1 times. Raises ValueError for
    an unknown weighting or prediction.
    """
    match (
        prediction
    ):  # SNR and 1, each divided by that multiple: to divide their minimum or sum gives 0 / 0 at the ends
        case "noise":
            snr, one = torch.ones_like(alpha_bar), (1 - alpha_bar) / alpha_bar
        case "x0":
            snr, one = alpha_bar / (1 - alpha_bar), torch.ones_like(alpha_bar)
        case "velocity":
            snr, one = alpha_bar, 1 - alpha_bar
        case _:
            raise ValueError(unknown_prediction(prediction))
    match weighting:
        case "uniform":
            return torch.ones_like(alpha_bar)
        case "min_snr":
            return torch.minimum(snr, gamma * one)
        case "level":
            return snr + one / data_std**2
    raise ValueError(f"unknown weighting {weighting!r}; choose one of {', '.join(WEIGHTINGS)}")


def variational_term(
    x_0: Float[Tensor, "batch *rest"],
    x_t: Float[Tensor, "batch *rest"],
    estimate: Float[Tensor, "batch *rest"],
    fraction: Float[Tensor, "batch *rest"],
    alpha_bar_t: Level,
    alpha_bar_s: Level,
) -> Float[Tensor, "batch"]:
    """The mean over an item of KL(q(x_s | x_t, x_0) || p(x_s | x_t)) in nats (Nichol & Dhariwal 2021, eq. 4 to 6).

    p is the network's step: the posterior's mean with its estimate of x_0, and the learned variance of its fraction.
    Detach the estimate where the term is to teach the variance alone (section 3.1). 0 where s is clean: that step has
    no variance to learn.
    """
    inner = alpha_bar_s < 1
    alpha_bar_s = torch.where(inner, alpha_bar_s, (1 + alpha_bar_t) / 2)  # any level does: the term is multiplied by 0
    true_mean, true_variance = posterior(x_t, x_0, alpha_bar_t, alpha_bar_s)
    mean, _ = posterior(x_t, estimate, alpha_bar_t, alpha_bar_s)
    variance = step_variance("learned", x_t, alpha_bar_t, alpha_bar_s, fraction)
    ratio = true_variance / variance
    kl = (ratio - ratio.log() - 1 + (true_mean - mean) ** 2 / variance) / 2
    return kl.reshape(len(kl), -1).mean(1) * inner.to(kl)
