"""Laws of x_0 whose perfect denoiser is known in closed form: what a sampler must return is then known too."""

import math

import torch

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
