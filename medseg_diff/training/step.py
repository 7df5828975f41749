"""One step of training: batch, noise, loss, gradient, moving average."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from medseg_diff.config import Config, Diffusion
from medseg_diff.datasets.cache import Volume
from medseg_diff.device import autocast
from medseg_diff.diffusion.masks import one_hot, to_analog
from medseg_diff.diffusion.schedule import alpha_bar
from medseg_diff.errors import UserError
from medseg_diff.training.batch import Batch, draw_step
from medseg_diff.training.objective import (
    VolumeScore,
    cross_entropy,
    denoiser_loss,
    generation_loss,
    mask_loss,
    mean_head_loss,
    unet_loss,
)
from medseg_diff.training.state import State

MOST_SKIPPED = 50

AUGMENTED = 0.75
"""Share of the budget in which augmentation is on. Scans as they are come last: augmented ones are harder, and a
network that saw nothing else expects errors that it does not make. The denoiser of conditional, which learns what is
drawn together and not how probable it is, gets augmented ones all the time."""

UNCHANGED = 5
"""Crops as they are that a network sees of each case at most: after more of them it begins to know them by heart."""


def take_step(state: State, config: Config, volumes: Sequence[Volume], classes: int) -> float:
    """One step of the optimizer and its loss; nan where loss or gradient is not finite: such a step changes no weight.

    A forward pass takes batch_size crops, each at a time of its own; the gradients of `accumulate` passes are gathered.
    Raises UserError after MOST_SKIPPED steps that changed nothing.
    """
    state.optimizer.zero_grad(set_to_none=True)
    device, passes = next(state.network.parameters()).device, config.train.accumulate
    spent = state.stage_spent(config)
    set_learning_rate(state.optimizer, config.train.lr, config.train.warmup, spent)
    augmented = config.train.augment and is_augmented(state, config, len(volumes))
    draws = config.diffusion.draws if state.denoising else 0
    batch = draw_step(config, volumes, classes, (config.seed, state.step), device, augmented, draws)
    loss = torch.zeros((), device=device)
    teach_condition = state.step % config.train.condition_every == 0
    for part in batch.parts(passes):
        share = loss_of(state.network, state.score, config, part, state.class_weight, teach_condition) / passes
        share.backward()
        loss += share.detach()
    norm = nn.utils.clip_grad_norm_(state.network.parameters(), config.train.clip)
    if not torch.isfinite(norm + loss):
        state.skipped += 1
        if state.skipped > MOST_SKIPPED:
            what = f"{state.skipped} steps had no finite loss, the last was step {state.step}"
            raise UserError("train", what, "Lower train.lr, or look for broken scans with medseg-diff check.")
        return float("nan")
    state.optimizer.step()
    steps = state.step - state.stage_step
    decay = min(config.train.ema, (1 + steps) / (10 + steps))
    with torch.no_grad():
        torch._foreach_lerp_(list(state.average.parameters()), list(state.network.parameters()), 1 - decay)
    return float(loss)


def is_augmented(state: State, config: Config, cases: int) -> bool:
    """Whether the next step changes its crops of so many cases."""
    spent = state.stage_spent(config)
    if state.denoising or spent < AUGMENTED:
        return True
    steps_left = (state.step - state.stage_step) * (1 / spent - 1)
    return steps_left * config.train.batch_size * config.train.accumulate > UNCHANGED * cases


def loss_of(
    network: nn.Module,
    score: VolumeScore,
    config: Config,
    batch: Batch,
    class_weight: Float[Tensor, "classes"],
    teach_condition: bool,
) -> Float[Tensor, ""]:
    """The loss of one forward pass; the network is called, wrapped or not.

    A batch with noise for draws teaches the denoiser of conditional, one without its mean head.
    """
    diffusion, device, classes = config.diffusion, batch.image.device, len(class_weight)
    with autocast(device, _precision(config, device)):
        match config.network.kind:
            case "conditional":
                if not batch.shared.shape[1]:
                    return mean_head_loss(network, batch.image, batch.labels, class_weight)
                return denoiser_loss(
                    network,
                    batch.image,
                    batch.labels,
                    _level(diffusion, batch.t),
                    batch.noise,
                    batch.shared,
                    batch.fields,
                    classes=classes,
                    scale=diffusion.scale,
                    score=score,
                )
            case "unet":
                return unet_loss(network, batch.image, batch.labels, classes=classes)
        if config.task == "generate":
            return _generation_loss(network, config, batch, classes)
        return mask_loss(
            network,
            batch.image,
            batch.labels,
            _level(diffusion, batch.t),
            batch.noise,
            classes=classes,
            scale=diffusion.scale,
            prediction=diffusion.prediction,
            weighting=diffusion.weighting,
            teach_condition=teach_condition,
        )


def held_out_loss(
    network: Any, config: Config, volumes: Sequence[Volume], classes: int, seed: tuple[int, int]
) -> Float[Tensor, ""]:
    """What validations compare, on one random batch: cross-entropy of the mean head, or the denoiser's own loss."""
    device = next(network.parameters()).device
    batch = draw_step(config, volumes, classes, seed, device, augmented=False)
    with torch.no_grad():
        if config.network.kind in ("conditional", "unet"):
            with autocast(device, _precision(config, device)):
                return cross_entropy(network.encode(batch.image).mean_logits, batch.labels)
        return loss_of(
            network, VolumeScore(classes), config, batch, torch.ones(classes, device=device), teach_condition=False
        )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float, warmup: float, spent: float) -> None:
    """Linear rise over the share `warmup` of the budget, then a cosine to 0; `spent` in [0, 1)."""
    rise = min(1.0, (spent + 1e-3) / warmup) if warmup else 1.0
    fall = 0.5 * (1 + np.cos(np.pi * max(0.0, spent - warmup) / (1 - warmup))) if warmup < 1 else 1.0
    for group in optimizer.param_groups:
        group["lr"] = lr * rise * float(fall)


def _generation_loss(network: nn.Module, config: Config, batch: Batch, classes: int) -> Tensor:
    diffusion, x_0 = config.diffusion, batch.image
    if config.data.pairs:
        x_0 = torch.cat([x_0, to_analog(one_hot(batch.labels, classes), diffusion.scale)], dim=1)
    nearer = batch.t - 1 / diffusion.train_steps
    return generation_loss(
        network,
        x_0,
        _level(diffusion, batch.t),
        batch.noise,
        prediction=diffusion.prediction,
        weighting=diffusion.weighting,
        cleaner=_level(diffusion, nearer.clamp_min(0)) if diffusion.variance == "learned" else None,
        train_steps=diffusion.train_steps,
    )


def _level(diffusion: Diffusion, t: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
    return alpha_bar(diffusion.schedule, t, zero_terminal=diffusion.zero_terminal, shift=diffusion.log_snr_shift)


def _precision(config: Config, device: torch.device) -> str:
    """As configured, unless it meets a fault of oneDNN (in torch 2.13.0).

    Its bf16 gradient for the weights of a 3-D convolution reads memory that nobody wrote where the first length is 2:
    now and then NaN, never twice the same.
    """
    coarsest = config.data.size[0] // 2 ** (len(config.network.widths) - 1)
    met = device.type == "cpu" and config.data.spatial_dims == 3 and coarsest <= 2
    return "fp32" if met else config.train.precision
