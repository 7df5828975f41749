"""One step of training: batch, noise, loss, gradient, moving average."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from medseg_diff.config import Config
from medseg_diff.datasets.augment import augment, margin_of
from medseg_diff.datasets.cache import Volume
from medseg_diff.datasets.pipeline import outside
from medseg_diff.datasets.slices import draw_batch
from medseg_diff.device import autocast
from medseg_diff.diffusion.schedule import alpha_bar
from medseg_diff.errors import UserError
from medseg_diff.training.objective import EnergyScore, conditional_loss, draw_levels, generation_loss, unet_loss
from medseg_diff.training.state import State

MOST_SKIPPED = 50


def take_step(state: State, config: Config, volumes: Sequence[Volume], classes: int) -> float:
    """One step of the optimizer and its loss; nan where loss or gradient is not finite: such a step changes no weight.

    Raises UserError after MOST_SKIPPED of these.
    """
    state.optimizer.zero_grad(set_to_none=True)
    loss = loss_of(state.network, state.score, config, volumes, classes, (config.seed, state.step))
    loss.backward()
    norm = nn.utils.clip_grad_norm_(state.network.parameters(), config.train.clip)
    if not torch.isfinite(norm + loss.detach()):
        state.skipped += 1
        if state.skipped > MOST_SKIPPED:
            what = f"{state.skipped} steps had no finite loss, the last was step {state.step}"
            raise UserError("train", what, "Lower train.lr, or look for broken scans with medseg-diff check.")
        return float("nan")
    state.optimizer.step()
    decay = min(config.train.ema, (1 + state.step) / (10 + state.step))
    with torch.no_grad():
        torch._foreach_lerp_(list(state.average.parameters()), list(state.network.parameters()), 1 - decay)
    return float(loss.detach())


def loss_of(
    network: nn.Module,
    score: EnergyScore,
    config: Config,
    volumes: Sequence[Volume],
    classes: int,
    seed: tuple[int, int],
) -> Float[Tensor, ""]:
    """The loss of one random batch, a function of the weights and of `seed`."""
    diffusion, device = config.diffusion, next(network.parameters()).device
    image, labels, generator = _batch(config, volumes, seed, device, config.train.augment)
    levels = draw_levels(len(image), diffusion.train_steps, diffusion.pure_noise, generator)
    abar = alpha_bar(diffusion.schedule, levels)
    with autocast(device, _precision(config, device)):
        match config.network.kind:
            case "conditional":
                return conditional_loss(
                    network,
                    image,
                    labels,
                    abar,
                    generator,
                    classes=classes,
                    scale=diffusion.scale,
                    draws=diffusion.draws,
                    mean_weight=config.train.mean_weight,
                    score=score,
                )
            case "unet":
                return unet_loss(network, image, labels, classes=classes)
            case "unconditional":
                return generation_loss(network, image, abar, generator)


def held_out_loss(network: Any, config: Config, volumes: Sequence[Volume], seed: tuple[int, int]) -> Float[Tensor, ""]:
    """What validations compare, on one random batch: cross-entropy of the mean head, or the error of the velocity."""
    diffusion, device = config.diffusion, next(network.parameters()).device
    image, labels, generator = _batch(config, volumes, seed, device, augmented=False)
    with autocast(device, _precision(config, device)), torch.no_grad():
        if config.task == "segment":
            return cross_entropy(network.encode(image).mean_logits, labels)
        levels = draw_levels(len(image), diffusion.train_steps, diffusion.pure_noise, generator)
        return generation_loss(network, image, alpha_bar(diffusion.schedule, levels), generator)


def _batch(
    config: Config, volumes: Sequence[Volume], seed: tuple[int, int], device: torch.device, augmented: bool
) -> tuple[Float[Tensor, "batch channels *space"], Int64[Tensor, "batch *space"], torch.Generator]:
    """Crops on the device, and the generator that goes on from there."""
    data = config.data
    rng = np.random.default_rng(seed)
    generator = torch.Generator(device).manual_seed(int(rng.integers(2**62)))
    image, labels = draw_batch(
        volumes,
        rng,
        batch_size=config.train.batch_size,
        size=data.size,
        margin=margin_of(data.size) if augmented else (0,) * data.spatial_dims,
        axis=data.axis,
        neighbours=data.neighbours if config.task == "segment" else 0,
        foreground=data.foreground,
        fill=outside(data.modality),
    )
    image, labels = image.to(device), labels.to(device).long()
    if augmented:
        image, labels = augment(image, labels, data.size, _spacing(config), generator, outside(data.modality))
    return image, labels, generator


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float, warmup: float, spent: float) -> None:
    """Linear rise over the share `warmup` of the budget, then a cosine to 0; `spent` in [0, 1)."""
    rise = min(1.0, (spent + 1e-3) / warmup) if warmup else 1.0
    fall = 0.5 * (1 + np.cos(np.pi * max(0.0, spent - warmup) / (1 - warmup))) if warmup < 1 else 1.0
    for group in optimizer.param_groups:
        group["lr"] = lr * rise * float(fall)


def _precision(config: Config, device: torch.device) -> str:
    """As configured, unless it meets a fault of oneDNN (in torch 2.13.0).

    Its bf16 gradient for the weights of a 3-D convolution reads memory that nobody wrote where the first length is 2:
    now and then NaN, never twice the same.
    """
    coarsest = config.data.size[0] // 2 ** (len(config.network.widths) - 1)
    met = device.type == "cpu" and config.data.spatial_dims == 3 and coarsest <= 2
    return "fp32" if met else config.train.precision


def _spacing(config: Config) -> tuple[float, ...]:
    """Along the axes of a crop."""
    data = config.data
    assert data.spacing_mm is not None, "training fills in the spacing"
    return data.spacing_mm if data.spatial_dims == 3 else tuple(np.delete(data.spacing_mm, data.axis).tolist())
