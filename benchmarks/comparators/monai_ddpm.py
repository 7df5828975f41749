"""MONAI's recipe for segmentation by a DDPM: its network and scheduler; the noise is predicted, the image concatenated.

As its tutorial (2d_diffusion_model_segmentation, after Wolleb et al. 2022) has it, on 2D slices, with every label a
channel in 0 and 1. Not its 1000 steps: 1000 calls for a slice of each sample would take hours for a volume.
"""

from collections.abc import Sequence

import numpy as np
import torch
from monai.networks.nets import DiffusionModelUNet
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn
from torch.nn import functional

from comparators.protocol import Prediction, fit, over_volume
from medseg_diff.checkpoint import Model
from medseg_diff.config import Config
from medseg_diff.datasets.cache import Volume
from medseg_diff.diffusion.masks import one_hot

TRAIN_STEPS = 1000
STEPS = 20
"""Of MONAI's DDIM; its DDPM scheduler is right for all TRAIN_STEPS only."""


def build(config: Config, channels: int, classes: int) -> nn.Module:
    """The tutorial's network."""
    labels = classes - 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return DiffusionModelUNet(
            spatial_dims=2,
            in_channels=channels * (2 * config.data.neighbours + 1) + labels,
            out_channels=labels,
            channels=(64, 64, 64),
            attention_levels=(False, False, True),
            num_res_blocks=1,
            num_head_channels=64,
        )


def train(volumes: Sequence[Volume], config: Config, classes: int, cpu_seconds: float) -> tuple[nn.Module, int]:
    scheduler = DDPMScheduler(num_train_timesteps=TRAIN_STEPS)

    def loss(network: nn.Module, image: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        x_0 = one_hot(labels, classes)[:, 1:]
        noise = torch.randn(x_0.shape, generator=generator)
        t = torch.randint(TRAIN_STEPS, (len(x_0),), generator=generator)
        x_t = scheduler.add_noise(x_0, noise, t)
        return functional.mse_loss(network(torch.cat([image, x_t], dim=1), t).float(), noise)

    return fit(build(config, len(volumes[0].image), classes), loss, volumes, config, classes, cpu_seconds)


def predict(model: Model, volume: Volume, samples: int, seed: int) -> Prediction:
    """The samples' mean is the probability, as in the tutorial; a sample's mask, its largest channel above 1/2."""
    generator = torch.Generator().manual_seed(seed)
    labels = len(model.about.labels) - 1
    scheduler = DDIMScheduler(num_train_timesteps=TRAIN_STEPS)
    scheduler.set_timesteps(STEPS)

    def draw(image: Tensor) -> Tensor:
        """One mask of every slice."""
        x_t = torch.randn(len(image), labels, *image.shape[2:], generator=generator)
        for t in scheduler.timesteps:
            noise = model.network(torch.cat([image, x_t], dim=1), t[None].expand(len(image))).float()
            x_t, _ = scheduler.step(noise, t, x_t)
        return x_t

    maps = torch.stack([over_volume(draw, model.about.config, volume.image) for _ in range(samples)])
    soft = maps.clamp(0, 1).mean(0)
    probabilities = torch.cat([(1 - soft.sum(0, keepdim=True)).clamp_min(1e-6), soft])
    drawn = torch.cat([torch.full_like(maps[:, :1], 0.5), maps], dim=1).argmax(1)
    return (probabilities / probabilities.sum(0)).numpy(), drawn.numpy().astype(np.uint8)
