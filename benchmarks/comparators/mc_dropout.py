"""MC dropout (Gal and Ghahramani 2016): our U-Net with dropout, which stays active when it predicts."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from comparators.protocol import CPU, Prediction, over_volume, timed, within
from medseg_diff.checkpoint import Model
from medseg_diff.checkpoint import build as build_unet
from medseg_diff.config import Config
from medseg_diff.datasets.cache import Volume
from medseg_diff.networks.blocks import ResidualBlock
from medseg_diff.training.state import begin
from medseg_diff.training.step import take_step

SHARE = 0.2


def build(config: Config, channels: int, classes: int) -> nn.Module:
    return with_dropout(build_unet(config, channels, classes))


def with_dropout(network: nn.Module) -> nn.Module:
    """Whole channels are dropped before the second convolution of every residual block; the weights stay the same."""
    for block in [module for module in network.modules() if isinstance(module, ResidualBlock)]:
        block.conv2 = nn.Sequential(Dropout(), block.conv2)
    return network


class Dropout(nn.Module):
    """Active whether the network trains or predicts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Zeroes the share SHARE of the channels of every item."""
        kept = torch.rand(x.shape[:2], device=x.device) >= SHARE
        return x * (kept / (1 - SHARE)).to(x.dtype).reshape(*kept.shape, *(1,) * (x.ndim - 2))


def train(volumes: Sequence[Volume], config: Config, classes: int, cpu_seconds: float) -> tuple[nn.Module, int]:
    torch.manual_seed(config.seed)
    config = timed(config, cpu_seconds)
    state = begin(config, len(volumes[0].image), classes, CPU, volumes)
    with_dropout(state.network)
    with_dropout(state.average)

    def step(count: int, spent: float) -> None:
        state.step, state.elapsed_s = count, spent * cpu_seconds
        take_step(state, config, volumes, classes)

    return state.average, within(cpu_seconds, config, state.optimizer, step)


def predict(model: Model, volume: Volume, samples: int, seed: int) -> Prediction:
    """A pass is a sample: its most probable labels; the probabilities are the mean of all passes."""
    torch.manual_seed(seed)
    total, drawn = 0.0, []
    for _ in range(samples):
        soft = over_volume(model.network, model.about.config, volume.image).softmax(0).numpy()
        total = total + soft / samples
        drawn.append(soft.argmax(0).astype(np.uint8))
    return np.asarray(total, np.float32), np.stack(drawn)
