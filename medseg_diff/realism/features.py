"""Features of images, learned on the training images: the bottleneck of an autoencoder, and what it misses."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.nn import functional

from medseg_diff.networks.blocks import convolution, nearest

BOTTLENECK = 48
BLOCKS = {2: 4, 3: 2}
"""Along a side: in each of them the energy of what the reconstruction misses is a feature."""

WIDTHS = (16, 32, 64)
"""Channels after each halving."""

LONGEST = {2: 64, 3: 32}
"""Pixels (or voxels) along a side that the network sees; larger images are pooled first."""

STEPS, LEARNING_RATE = 300, 4e-3
BATCH = {2: 32, 3: 8}
"""Slices, or volumes, in a step."""

TOGETHER = 64
"""Images in one call."""


class Autoencoder(nn.Module):
    """Strided convolutions to a vector, and back to the image."""

    def __init__(self, channels: int, size: tuple[int, ...]) -> None:
        super().__init__()
        dims = len(size)
        self.factor = -(-max(size) // LONGEST[dims])
        self.size = tuple(length // self.factor for length in size)
        self.coarse = tuple(math.ceil(length / 2 ** len(WIDTHS)) for length in self.size)
        pairs = list(itertools.pairwise((channels, *WIDTHS)))
        self.down = nn.ModuleList(convolution(dims, fine, coarse, stride=2) for fine, coarse in pairs)
        self.encode = nn.Linear(WIDTHS[-1] * math.prod(self.coarse), BOTTLENECK)
        self.decode = nn.Linear(BOTTLENECK, WIDTHS[-1] * math.prod(self.coarse))
        back = list(itertools.pairwise((*reversed(WIDTHS), WIDTHS[0])))
        self.up = nn.ModuleList(convolution(dims, coarse, fine) for coarse, fine in back)
        self.head = convolution(dims, WIDTHS[0], channels)

    def pooled(self, image: Float[Tensor, "batch channels *size"]) -> Float[Tensor, "batch channels *smaller"]:
        """What the network sees of an image."""
        if self.factor == 1:
            return image
        return (functional.avg_pool2d if image.ndim == 4 else functional.avg_pool3d)(image, self.factor)

    def bottleneck(self, x: Float[Tensor, "batch channels *size"]) -> Float[Tensor, "batch features"]:
        """The vector of a pooled image."""
        for layer in self.down:
            x = functional.silu(layer(x))
        return self.encode(x.flatten(1))

    def rebuild(self, h: Float[Tensor, "batch features"]) -> Float[Tensor, "batch channels *size"]:
        """A pooled image from its vector."""
        x = self.decode(h).reshape(len(h), WIDTHS[-1], *self.coarse)
        for layer in self.up:
            x = nearest(functional.silu(layer(x)))
        return self.head(x)[(..., *map(slice, self.size))]

    def forward(self, x: Float[Tensor, "batch channels *size"]) -> Float[Tensor, "batch channels *size"]:
        """Reconstruction of a pooled image."""
        return self.rebuild(self.bottleneck(x))


@dataclass(frozen=True)
class Extractor:
    """A trained autoencoder, and mean and standard deviation of the features over images of its training."""

    network: Autoencoder
    mean: Float64[np.ndarray, "features"]
    std: Float64[np.ndarray, "features"]


def train_extractor(
    draw: Callable[[int, int], Float[Tensor, "batch channels *size"]], seed: int, *, steps: int = STEPS
) -> Extractor:
    """Trains an autoencoder on `draw(count, number of the batch)`: the same batches and seed, the same features."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = draw(1, 0)
        network = Autoencoder(first.shape[1], tuple(first.shape[2:]))
    batch = BATCH[first.ndim - 2]
    optimizer = torch.optim.Adam(network.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for step in range(steps):
        image = network.pooled(draw(batch, step))
        optimizer.zero_grad()
        functional.mse_loss(network(image), image).backward()
        optimizer.step()
        rate.step()
    network.eval().requires_grad_(False)
    found = np.concatenate([_measure(network, draw(batch, step)) for step in range(min(steps, 2048 // batch))])
    return Extractor(network, found.mean(0), found.std(0) + 1e-6)


def features(extractor: Extractor, images: Float[Tensor, "n channels *size"]) -> Float64[np.ndarray, "n features"]:
    """In standard deviations of the training images: the bottleneck, then for each block the log energy of the rest.

    Without the latter noise and texture would go unseen: an autoencoder maps noise near the mean of all images.
    """
    return (_measure(extractor.network, images) - extractor.mean) / extractor.std


@torch.inference_mode()
def explained(extractor: Extractor, images: Float[Tensor, "n channels *size"]) -> float:
    """Share of the images' variance that the reconstruction from the features has: what the features see."""
    seen = extractor.network.pooled(images)
    rebuilt = torch.cat([extractor.network(part) for part in seen.split(TOGETHER)])
    return 1 - float((rebuilt - seen).square().mean() / seen.var())


@torch.inference_mode()
def _measure(network: Autoencoder, images: Float[Tensor, "n channels *size"]) -> Float64[np.ndarray, "n features"]:
    pool = functional.adaptive_avg_pool2d if images.ndim == 4 else functional.adaptive_avg_pool3d
    found = []
    for part in images.split(TOGETHER):
        x = network.pooled(part)
        h = network.bottleneck(x)
        missed = (x - network.rebuild(h)).square().mean(1, keepdim=True)
        found.append(torch.cat([h, (pool(missed, BLOCKS[images.ndim - 2]) + 1e-6).log().flatten(1)], dim=1))
    return torch.cat(found).double().numpy()
