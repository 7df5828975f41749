"""All that is random in a step: crops, their times on the schedule, their noise."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from medseg_diff.config import Config
from medseg_diff.datasets.augment import augment, margin_of
from medseg_diff.datasets.cache import Volume
from medseg_diff.datasets.pipeline import outside
from medseg_diff.datasets.slices import draw_batch
from medseg_diff.diffusion.fields import SPACINGS, cells, smooth
from medseg_diff.networks.conditional import SHARED, STRIDE


@dataclass(frozen=True)
class Batch:
    """Crops on the device, a random time for each, the noise of x_t; and of the draws, where there are any."""

    image: Float[Tensor, "batch channels *space"]
    labels: Int64[Tensor, "batch *space"]
    t: Float64[Tensor, "batch"]
    noise: Float[Tensor, "batch maps *grid"]
    shared: Float[Tensor, "batch draws classes numbers"]
    fields: Float[Tensor, "batch draws classes scales *half"]

    def parts(self, count: int) -> Iterator["Batch"]:
        """Equal parts of the batch, one after the other."""
        tensors = self.image, self.labels, self.t, self.noise, self.shared, self.fields
        return (Batch(*part) for part in zip(*(x.chunk(count) for x in tensors), strict=True))


def draw_step(
    config: Config,
    volumes: Sequence[Volume],
    classes: int,
    seed: tuple[int, int],
    device: torch.device,
    augmented: bool,
    draws: int = 0,
) -> Batch:
    """The whole batch of a step with noise for so many draws, a function of `seed` alone: however it is parted, its
    gradient is the same."""
    data, diffusion = config.data, config.diffusion
    rng = np.random.default_rng(seed)
    generator = torch.Generator(device).manual_seed(int(rng.integers(2**62)))
    image, labels = draw_batch(
        volumes,
        rng,
        batch_size=config.train.batch_size * config.train.accumulate,
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
    t = draw_times(len(image), diffusion.train_steps, diffusion.pure_noise, generator)
    count = len(image)
    shape = _noise_shape(config, image.shape[1], classes)
    noise = torch.randn((count, *shape), generator=generator, device=device)
    return Batch(image, labels, t, noise, *_draw_noise((count, draws, classes), data.size, generator))


def draw_times(count: int, train_steps: int, pure_noise: float, generator: torch.Generator) -> Float[Tensor, "count"]:
    """Random t in (0, 1] on a grid of train_steps, in float64; the share `pure_noise` of them is exactly 1."""
    device = generator.device
    t = torch.randint(1, train_steps + 1, (count,), generator=generator, device=device).double() / train_steps
    pure = torch.rand(count, generator=generator, device=device) < pure_noise
    return torch.where(pure, torch.ones_like(t), t)


def _noise_shape(config: Config, channels: int, classes: int) -> tuple[int, ...]:
    """Maps and grid of the noise of one crop's x_t."""
    size = config.data.size
    match config.network.kind:
        case "unet":
            return 0, *size
        case "conditional":
            return classes, *(length // STRIDE for length in size)
    if config.task == "generate":
        return channels + (classes if config.data.pairs else 0), *size
    return classes, *size


def _draw_noise(count: tuple[int, ...], size: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers that a crop shares, [*count, SHARED], and fields, [*count, scales, *half]."""
    device, start = generator.device, (0,) * len(size)
    shared = torch.randn((*count, SHARED), generator=generator, device=device)
    fields = []
    for spacing in SPACINGS:
        places = (len(cells(0, length, spacing)) for length in size)
        white = torch.randn((*count, *places), generator=generator, device=device)
        fields.append(smooth(white, start, size, spacing))
    return shared, torch.stack(fields, dim=3)


def _spacing(config: Config) -> tuple[float, ...]:
    """Along the axes of a crop."""
    data = config.data
    assert data.spacing_mm is not None, "training fills in the spacing"
    return data.spacing_mm if data.spatial_dims == 3 else tuple(np.delete(data.spacing_mm, data.axis).tolist())
