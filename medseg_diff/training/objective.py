"""What training minimizes. Every loss calls the network that it is given, wrapped or not."""

from collections.abc import Iterator
from itertools import combinations, pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from medseg_diff.diffusion.losses import loss_weight, variational_term
from medseg_diff.diffusion.masks import IGNORED, input_scale, one_hot, pool, to_analog
from medseg_diff.diffusion.process import add_noise, input_scale_wiener, target, x0_from
from medseg_diff.networks.conditional import STRIDE

BLOCKS = (2, 4, 8, 16)
"""Sides in voxels of the blocks whose volumes are scored."""

CONDITION_CE = 10.0
"""beta of MedSegDiff-V2, the weight of cross-entropy beside Dice on the condition model: as large as we recall it."""

Image = Float[Tensor, "batch channels *space"]
Labels = Int[Tensor, "batch *space"]
Level = Float[Tensor, "batch"]


class VolumeScore(nn.Module):
    """How well draws tell the volumes of a mask: the continuous ranked probability score, block by block.

    E |V - v| - E |V - V'| / 2, without bias (V and V' of different draws; Gneiting & Raftery 2007, eq. 21), of the
    volume of every class in blocks of 2, 4, 8 and 16 voxels a side and in the whole crop. It is proper for each of
    them, and together they tell which voxels are drawn together. Each size and class is divided by its running mean
    distance |V - v|, since the largest would drown the others. The energy score of all blocks at once would not do:
    where the truth has many small independent errors, it is least for draws that vary too much in few directions.
    """

    def __init__(self, classes: int, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.typical: Tensor
        self.register_buffer("typical", torch.zeros(len(BLOCKS) + 1, classes))

    def forward(
        self, drawn: Float[Tensor, "draws batch classes *space"], truth: Float[Tensor, "batch classes *space"]
    ) -> Float[Tensor, ""]:
        """Masks drawn (2 or more), against the one-hot truth."""
        scores = []
        for scale, volumes in enumerate(_volumes(torch.cat([drawn, truth[None]]))):
            *of_draws, reference = volumes
            error = torch.stack([_apart(v, reference) for v in of_draws]).mean(0)
            spread = torch.stack([_apart(a, b) for a, b in combinations(of_draws, 2)]).mean(0)
            if self.training:
                found = error.detach()
                old = self.typical[scale]
                mean = torch.where(old > 0, self.decay * old + (1 - self.decay) * found, found)
                self.typical[scale] = torch.where(
                    found > 0, mean, old
                )  # of a class that isn't there nothing is learned
            scores.append((error - spread / 2) / self.typical[scale].clamp_min(1e-6))
        return torch.stack(scores).mean()


def mean_head_loss(
    network: nn.Module, image: Image, labels: Labels, class_weight: Float[Tensor, "classes"]
) -> Float[Tensor, ""]:
    """Cross-entropy of conditional's mean head."""
    return weighted_cross_entropy(network(image).float(), labels, class_weight)


def denoiser_loss(
    network: nn.Module,
    image: Image,
    labels: Labels,
    alpha_bar: Level,
    noise: Float[Tensor, "batch classes *coarse"],
    shared: Float[Tensor, "batch draws classes numbers"],
    fields: Float[Tensor, "batch draws classes scales *half"],
    *,
    classes: int,
    scale: float,
    score: VolumeScore,
) -> Float[Tensor, ""]:
    """Score of conditional's draws. All draws of an image share one noisy mask x_t."""
    truth = one_hot(labels, classes)
    known = truth.sum(1, keepdim=True)
    x_0 = to_analog(pool(truth, STRIDE), scale)
    x_t = add_noise(x_0, noise, alpha_bar)
    state = (_along(input_scale_wiener(alpha_bar, scale), x_t) * x_t)[None]
    drawn_logits = network(image, state, alpha_bar.to(image), shared.movedim(1, 0), fields.movedim(1, 0))
    return score(hard(drawn_logits.float()) * known, truth)


def hard(logits: Float[Tensor, "draws batch classes *space"]) -> Float[Tensor, "draws batch classes *space"]:
    """One-hot masks, with the gradient of the softmax (straight-through, Jang et al. 2017).

    Scored soft, masks would have to vary more than the truth does before their volumes vary as much.
    """
    soft = logits.softmax(2)
    return soft + ((logits == logits.amax(2, keepdim=True)).to(soft) - soft).detach()


def weighted_cross_entropy(
    logits: Float[Tensor, "batch classes *space"], labels: Labels, class_weight: Float[Tensor, "classes"]
) -> Float[Tensor, ""]:
    """A proper score that hears rare classes: mean of -w_y ln q_y, where q is proportional to w p.

    Weighted cross-entropy alone is least at q proportional to w p for the true p, and that is what the network's
    probabilities p are turned into before it is taken: so the network is not pushed away from p.
    """
    shifted = logits + class_weight.log().reshape(-1, *(1,) * (logits.ndim - 2))
    return cross_entropy(shifted, labels, class_weight)


def cross_entropy(
    logits: Float[Tensor, "batch classes *space"], labels: Labels, class_weight: Float[Tensor, "classes"] | None = None
) -> Float[Tensor, ""]:
    """Mean over the voxels whose class is known; 0 where none is."""
    found = functional.cross_entropy(logits, labels, class_weight, reduction="none", ignore_index=IGNORED)
    return found.sum() / (labels != IGNORED).sum().clamp_min(1)


def class_weights(frequency: Float[Tensor, "classes"]) -> Float[Tensor, "classes"]:
    """One over the root of a class's share of the voxels, scaled to 1 in the mean over voxels."""
    weight = frequency.clamp_min(1e-6).rsqrt()
    return weight / (weight * frequency).sum()


def unet_loss(network: nn.Module, image: Image, labels: Labels, *, classes: int) -> Float[Tensor, ""]:
    """Soft Dice over the batch and cross-entropy, as strong U-Nets are trained."""
    logits = network(image).float()
    return cross_entropy(logits, labels) + dice_loss(logits, one_hot(labels, classes))


def mask_loss(
    network: nn.Module,
    image: Image,
    labels: Labels,
    alpha_bar: Level,
    noise: Float[Tensor, "batch classes *space"],
    *,
    classes: int,
    scale: float,
    prediction: str,
    weighting: str,
    teach_condition: bool = False,
) -> Float[Tensor, ""]:
    """Squared error of a denoiser of masks (DDPM, eq. 14; MedSegDiff).

    Where the network has a condition model with a mask of its own, `teach_condition` adds Dice and cross-entropy of
    that mask. MedSegDiff-V2 does so where t = 0 mod alpha; the caller reads t as the step of training.
    """
    truth = one_hot(labels, classes)
    x_0 = to_analog(truth, scale)
    x_t = add_noise(x_0, noise, alpha_bar)
    output, condition = network(image, _along(input_scale(alpha_bar, scale), x_t) * x_t, alpha_bar.to(image))
    weight = loss_weight(weighting, prediction, alpha_bar, data_std=scale)
    known = truth.sum(1, keepdim=True)
    loss = _weighted_error(output * known, target(prediction, x_0, noise, alpha_bar) * known, weight)
    if condition is not None:
        logits = condition.float()
        of_condition = dice_loss(logits, truth) + CONDITION_CE * cross_entropy(logits, labels)
        loss = loss + teach_condition * of_condition  # times 0, not left out: DDP wants a gradient for every weight
    return loss


def generation_loss(
    network: nn.Module,
    x_0: Image,
    alpha_bar: Level,
    noise: Image,
    *,
    prediction: str,
    weighting: str,
    cleaner: Level | None = None,
    train_steps: int = 1000,
) -> Float[Tensor, ""]:
    """Squared error of a denoiser of images (DDPM, eq. 14), or of images with their masks as further channels.

    With `cleaner`, the level one training step nearer to clean, the network's second half of channels is taught the
    variance by the variational bound (Nichol & Dhariwal 2021, eq. 16), which does not teach the first half.
    """
    x_t = add_noise(x_0, noise, alpha_bar)
    output = network(x_t, alpha_bar.to(x_t)).float()
    bound = output.new_zeros(())
    if cleaner is not None:
        output, fraction = output.chunk(2, dim=1)
        estimate = x0_from(prediction, x_t, output.detach(), alpha_bar)
        terms = variational_term(x_0, x_t, estimate, fraction.sigmoid(), alpha_bar, cleaner)
        bound = terms.mean() * train_steps / 1000  # their lambda of 0.001, and the sum over all steps
    weight = loss_weight(weighting, prediction, alpha_bar)
    return _weighted_error(output, target(prediction, x_0, noise, alpha_bar), weight) + bound


def dice_loss(
    logits: Float[Tensor, "batch classes *space"], truth: Float[Tensor, "batch classes *space"]
) -> Float[Tensor, ""]:
    """1 - soft Dice over the batch and the voxels whose class is known, mean over the classes but the background."""
    over = [0, *range(2, logits.ndim)]
    probability = logits.softmax(1) * truth.sum(1, keepdim=True)
    overlap, mass = (probability * truth).sum(over)[1:], (probability + truth).sum(over)[1:]
    return 1 - ((2 * overlap + 1) / (mass + 1)).mean()


def _weighted_error(output: Tensor, wanted: Tensor, weight: Float[Tensor, "batch"]) -> Tensor:
    return (weight.to(wanted) * (output.float() - wanted).square().flatten(1).mean(1)).mean()


def _along(coefficient: Tensor, x: Tensor) -> Tensor:
    """One number an item, in x's type and number of dimensions."""
    return coefficient.to(x).reshape(-1, *(1,) * (x.ndim - 1))


def _volumes(
    masks: Float[Tensor, "masks batch classes *space"],
) -> Iterator[Float[Tensor, "masks batch classes blocks"]]:
    """The share of each class in every block, from small blocks to large, and in the whole."""
    blocks = masks.flatten(0, 1)
    for smaller, size in pairwise((1, *BLOCKS)):
        blocks = pool(blocks, size // smaller)
        yield blocks.unflatten(0, masks.shape[:2]).flatten(3)
    yield masks.flatten(3).mean(-1, keepdim=True)


def _apart(
    a: Float[Tensor, "batch classes blocks"], b: Float[Tensor, "batch classes blocks"]
) -> Float[Tensor, "classes"]:
    return (a - b).abs().mean((0, 2))
