"""What a configuration says of sampling, for masks and images alike: the path, the sampler, the estimate of x_0."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from jaxtyping import Float, Float64
from torch import Tensor

from medseg_diff.checkpoint import Model
from medseg_diff.config import Config, plain
from medseg_diff.config_file import parse_config
from medseg_diff.device import autocast
from medseg_diff.diffusion.process import x0_from
from medseg_diff.diffusion.sampler import clip, dynamic_threshold, sample
from medseg_diff.diffusion.schedule import levels
from medseg_diff.errors import UserError


def path_of(config: Config, steps: int) -> Float64[Tensor, "levels"]:
    """The noise levels of so many steps, from noise to clean. Raises UserError for more steps than the spacing has."""
    diffusion = config.diffusion
    try:
        return levels(
            diffusion.schedule,
            steps,
            spacing=config.segment.spacing,
            train_steps=diffusion.train_steps,
            zero_terminal=diffusion.zero_terminal,
            shift=diffusion.log_snr_shift,
        )
    except ValueError as error:
        raise UserError(f"{steps} steps", str(error), "Take fewer --steps, or train with another spacing.") from error


def draw(
    config: Config,
    denoise: Callable[[Tensor, Tensor], Any],
    x_T: Float[Tensor, "batch *rest"],
    steps: int,
    noise: Callable[[int], Tensor],
) -> Float[Tensor, "batch *rest"]:
    """`sample` as the configuration says. noise(step) is asked of stochastic samplers only."""
    settings, variance = config.segment, config.diffusion.variance
    return sample(
        denoise,
        x_T,
        path_of(config, steps),
        method=method_of(config),
        eta=settings.eta,
        variance="small" if variance == "learned" else variance,
        limit=_limit(config),
        noise=noise,
    )


def method_of(config: Config) -> str:
    """The sampler's name."""
    if config.segment.sampler != "auto":
        return config.segment.sampler
    return "ddpm" if config.network.kind == "conditional" or config.diffusion.variance != "small" else "dpm++"


def estimate(
    model: Model, call: Callable[[Tensor, Tensor], Tensor], x_t: Float[Tensor, "batch *rest"], alpha_bar: Tensor
) -> Any:
    """x_0 from what a network predicts at one level; a pair with the fraction of the variance where it learned that."""
    config, level = model.about.config, alpha_bar.expand(len(x_t))
    with autocast(model.device, config.train.precision):
        output = call(x_t, level.to(x_t)).float()
    if config.diffusion.variance != "learned":
        return x0_from(config.diffusion.prediction, x_t, output, level)
    output, fraction = output.chunk(2, dim=1)
    return x0_from(config.diffusion.prediction, x_t, output, level), fraction.sigmoid()


def resampled(model: Model, **changes: Any) -> Model:
    """The model with other settings of sampling than it was saved with; None changes nothing. Raises UserError."""
    changes = {key: value for key, value in changes.items() if value is not None}
    if not changes:
        return model
    named = " ".join(f"--{key} {value}" for key, value in changes.items())
    if model.about.config.network.kind == "unet":
        raise UserError(named, "this model is deterministic, it draws no samples", f"Leave {named} out.")
    content = plain(model.about.config)
    config = parse_config(content | {"segment": content["segment"] | changes}, named)
    fitted = model.about.calibration
    if fitted is not None and method_of(config) != method_of(model.about.config):
        fitted = replace(fitted, intervals={})  # of another sampler's draws
    return replace(model, about=replace(model.about, config=config, calibration=fitted))


def _limit(config: Config) -> Callable[[Tensor], Tensor] | None:
    bound = config.diffusion.scale if config.task == "segment" else 1.0
    match config.segment.limit:
        case "clip":
            return partial(clip, bound=bound)
        case "dynamic":
            return partial(dynamic_threshold, bound=bound)
    return None
