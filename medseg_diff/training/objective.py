"""What training minimizes. Every loss calls the network that it is given, wrapped or not."""

from collections.abc import Iterator
from itertools import combinations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from medseg_diff.diffusion.masks import one_hot, pool, to_analog
from medseg_diff.diffusion.process import add_noise, input_scale_wiener, velocity
from medseg_diff.networks.conditional import STRIDE

Image = Float[Tensor, "batch channels *space"]
Labels = Int[Tensor, "batch *space"]


class EnergyScore(nn.Module):
    """Multi-scale energy score of drawn masks: a proper score of their distribution (Gneiting & Raftery 2007, eq. 21).

    E |P - y| - E |P - P'| / 2, without bias (i != j), averaged over the mask itself, its blocks of 4 and of 16 voxels
    and its total volumes. Each is divided by its running mean distance, since the finest would drown the others.
    """

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.typical: Tensor
        self.register_buffer("typical", torch.zeros(4))

    def forward(
        self, drawn: Float[Tensor, "draws batch classes *space"], truth: Float[Tensor, "batch classes *space"]
    ) -> Float[Tensor, ""]:
        """Probabilities drawn (2 or more), against the one-hot truth."""
        scores = []
        for scale, (d, y) in enumerate(zip(_scales(drawn), _scales(truth[None]), strict=True)):
            error = _distance(d, y).mean()
            spread = torch.stack([_distance(a, b) for a, b in combinations(d.split(1), 2)]).mean()
            if self.training:
                found = error.detach()
                old = self.typical[scale]
                self.typical[scale] = torch.where(old > 0, self.decay * old + (1 - self.decay) * found, found)
            scores.append((error - spread / 2) / self.typical[scale].clamp_min(1e-6))
        return torch.stack(scores).mean()


def draw_levels(count: int, train_steps: int, pure_noise: float, generator: torch.Generator) -> Float[Tensor, "count"]:
    """Random t in (0, 1] on a grid of train_steps; the share `pure_noise` of them is exactly 1."""
    device = generator.device
    t = torch.randint(1, train_steps + 1, (count,), generator=generator, device=device) / train_steps
    pure = torch.rand(count, generator=generator, device=device) < pure_noise
    return torch.where(pure, torch.ones_like(t), t)


def conditional_loss(
    network: nn.Module,
    image: Image,
    labels: Labels,
    alpha_bar: Float[Tensor, "batch"],
    generator: torch.Generator,
    *,
    classes: int,
    scale: float,
    draws: int,
    mean_weight: float,
    score: EnergyScore,
) -> Float[Tensor, ""]:
    """Cross-entropy of the mean head, energy score of the draws. All draws of an image share one noisy mask x_t."""
    truth = one_hot(labels, classes)
    x_0 = to_analog(pool(truth, STRIDE), scale)
    x_t = add_noise(x_0, _noise(x_0.shape, generator), alpha_bar)
    weight = input_scale_wiener(alpha_bar, scale).reshape(-1, *(1,) * (x_t.ndim - 1))
    states = (weight * x_t).expand(draws, *x_t.shape)
    mean_logits, drawn_logits = network(image, states, alpha_bar, _noise(states.shape, generator))
    cross_entropy = functional.cross_entropy(mean_logits.float(), labels)
    return mean_weight * cross_entropy + score(drawn_logits.float().softmax(2), truth)


def unet_loss(network: nn.Module, image: Image, labels: Labels, *, classes: int) -> Float[Tensor, ""]:
    """Soft Dice over the batch and cross-entropy, as strong U-Nets are trained."""
    logits = network(image).float()
    truth = one_hot(labels, classes)
    over = [0, *range(2, logits.ndim)]
    probability = logits.softmax(1)
    overlap, mass = (probability * truth).sum(over)[1:], (probability + truth).sum(over)[1:]
    dice = (2 * overlap + 1) / (mass + 1)
    return functional.cross_entropy(logits, labels) + 1 - dice.mean()


def generation_loss(
    network: nn.Module, image: Image, alpha_bar: Float[Tensor, "batch"], generator: torch.Generator
) -> Float[Tensor, ""]:
    """Mean squared error of the velocity (Salimans & Ho 2022): defined at pure noise too, where it asks for -x_0."""
    noise = _noise(image.shape, generator)
    predicted = network(add_noise(image, noise, alpha_bar), alpha_bar)
    return functional.mse_loss(predicted.float(), velocity(image, noise, alpha_bar))


def _noise(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def _scales(mask: Float[Tensor, "draws batch classes *space"]) -> Iterator[Float[Tensor, "draws batch features"]]:
    yield mask.flatten(2)
    for block in (4, 16):
        yield pool(mask.flatten(0, 1), block).unflatten(0, mask.shape[:2]).flatten(2)
    yield mask.flatten(3).mean(-1)


def _distance(a: Float[Tensor, "draws batch features"], b: Float[Tensor, "#draws batch features"]) -> Tensor:
    return torch.linalg.vector_norm(a - b, dim=-1)
