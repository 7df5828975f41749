"""Stochastic segmentation networks (Monteiro et al. 2020) on our encoder: Gaussian logits of low rank."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from comparators.protocol import Prediction, fit, over_volume
from medseg_diff.checkpoint import Model
from medseg_diff.config import Config
from medseg_diff.datasets.cache import Volume
from medseg_diff.networks.blocks import UNet, convolution

RANK = 10
DRAWS = 20
"""Monte-Carlo samples of the likelihood in training."""

AT_ONCE = 8


class StochasticUNet(nn.Module):
    """Mean, logarithm of the diagonal, and RANK factors of the logits' covariance, [batch, classes * (2 + RANK)]."""

    def __init__(self, dims: int, channels: int, classes: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder = UNet(dims, channels, widths)
        self.head = convolution(dims, widths[0], classes * (2 + RANK), kernel=1)

    def forward(self, image: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch parameters *space"]:
        """All parameters of the law, one after another."""
        return self.head(self.encoder(image)[0])


def build(config: Config, channels: int, classes: int) -> nn.Module:
    data = config.data
    stacked = channels * (2 * data.neighbours + 1) if data.spatial_dims == 2 else channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return StochasticUNet(data.spatial_dims, stacked, classes, config.network.widths)


def draw_logits(
    parameters: Float[Tensor, "batch parameters *space"], draws: int, generator: torch.Generator
) -> Float[Tensor, "draws batch classes *space"]:
    """mean + factors z + sqrt(diagonal) e; z is one vector for all voxels of an item, e of every voxel's own."""
    grouped = parameters.unflatten(1, (2 + RANK, -1))
    mean, deviation, factors = grouped[:, 0], (grouped[:, 1] / 2).exp(), grouped[:, 2:]
    z = torch.randn(draws, len(parameters), RANK, generator=generator)
    e = torch.randn(draws, *mean.shape, generator=generator)
    return mean + torch.einsum("mbr,br...->mb...", z, factors) + deviation * e


def negative_log_likelihood(
    logits: Float[Tensor, "draws batch classes *space"], labels: Int[Tensor, "batch *space"]
) -> Float[Tensor, ""]:
    """-log mean_m exp(sum over voxels of log p(label | logits_m)), eq. 5, a voxel; mean over the batch."""
    draws = len(logits)
    index = labels.expand(draws, *labels.shape)[:, :, None]
    of_voxels = logits.log_softmax(2).gather(2, index).flatten(2)
    of_masks = torch.logsumexp(of_voxels.sum(2), dim=0) - math.log(draws)
    return -of_masks.mean() / of_voxels.shape[2]


def loss(network: nn.Module, image: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    return negative_log_likelihood(draw_logits(network(image).float(), DRAWS, generator), labels)


def train(volumes: Sequence[Volume], config: Config, classes: int, cpu_seconds: float) -> tuple[nn.Module, int]:
    return fit(build(config, len(volumes[0].image), classes), loss, volumes, config, classes, cpu_seconds)


def predict(model: Model, volume: Volume, samples: int, seed: int) -> Prediction:
    """A sample is the most probable labels under drawn logits, as in the paper; probabilities are the draws' mean."""
    generator = torch.Generator().manual_seed(seed)
    parameters = over_volume(model.network, model.about.config, volume.image)[None]
    total, drawn = torch.zeros(()), []
    for start in range(0, samples, AT_ONCE):
        logits = draw_logits(parameters, min(AT_ONCE, samples - start), generator)[:, 0]
        total = total + logits.softmax(1).sum(0) / samples
        drawn.append(logits.argmax(1).to(torch.uint8))
    return total.numpy(), torch.cat(drawn).numpy()
