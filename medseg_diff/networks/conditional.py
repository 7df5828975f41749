"""Encode once, draw lightly: an image encoder that never sees the noise, and a small denoiser that draws masks."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from medseg_diff.diffusion.fields import COARSE, SPACINGS, gumbel
from medseg_diff.networks.blocks import LevelEmbedding, ResidualBlock, UNet, convolution, nearest, start_at_zero

STRIDE = 4
"""The noisy mask lives on a grid this many times coarser than the image's."""

SHARED = 8
"""Random numbers of a class that all of a scan shares."""

SHARPNESS = 3.0
"""Of the draws' logits: it moves no border, and decides how far from a border the gradient of a mask is felt."""

READOUT = (16, 32, 32)
"""Channels of the image's features at strides 2, 4 and 8, as the denoiser sees them."""


@dataclass(frozen=True)
class Features:
    """What the denoiser needs of an image, computed once."""

    mean_logits: Float[Tensor, "batch classes *space"]
    pyramid: tuple[Tensor, ...]


class Denoiser(nn.Module):
    """Draws clean masks from a noisy low-resolution one.

    The random choice is made by the Gumbel-max trick: where every G_k is a Gumbel number of its own, the k with the
    largest log p_k + G_k is a draw from p (Gumbel 1954; Maddison et al. 2014). Here p is the mean head's, and G_k a
    field: Gaussian fields of several scales, and numbers that all of the scan shares, mixed at every voxel with weights
    of unit norm. So each voxel alone is drawn with the mean head's probabilities, whatever the weights, and what they
    learn is which voxels are drawn together. They are computed once for all draws; a draw costs a weighted sum. Blocks
    of 2 voxels share their G: interpolated noise would be weaker, and draw rare labels too rarely.

    A noisy mask, where there is one, changes the weights and shifts the probabilities.
    """

    def __init__(self, dims: int, classes: int, widths: tuple[int, ...], embedding: int = 64) -> None:
        super().__init__()
        half, quarter, eighth = READOUT
        self.dims = dims
        self.project = nn.ModuleList(
            convolution(dims, width, out, kernel=1) for width, out in zip(widths[1:], READOUT, strict=False)
        )
        self.embed = LevelEmbedding(embedding)
        self.state = nn.Sequential(convolution(dims, classes, quarter), nn.SiLU(), convolution(dims, quarter, quarter))
        self.down = convolution(dims, quarter, eighth, stride=2)
        self.blocks = nn.ModuleList(ResidualBlock(dims, w, w, embedding) for w in READOUT)
        self.up = nn.ModuleList(convolution(dims, a, b, kernel=1) for a, b in ((quarter, half), (eighth, quarter)))
        self.weights = convolution(dims, half, classes * (SHARED + len(SPACINGS)), kernel=1)
        self.shift = convolution(dims, half, classes, kernel=1)
        start_at_zero(self.shift)

    def features(self, decoded: list[Tensor]) -> tuple[Tensor, ...]:
        """The projected pyramid."""
        return tuple(layer(m) for layer, m in zip(self.project, decoded[1:], strict=False))

    def forward(
        self,
        features: Features,
        x_t: Float[Tensor, "states batch classes *coarse"],
        alpha_bar: Float[Tensor, "batch"],
        shared: Float[Tensor, "draws batch classes numbers"],
        fields: Float[Tensor, "draws batch classes scales *half"],
    ) -> Float[Tensor, "draws batch classes *space"]:
        """Logits of every draw. There is a noisy mask for each, or one for all; it comes scaled, 0 at pure noise.

        The mean head's logits are not taught here: cross-entropy alone keeps them calibrated.
        """
        states, batch = x_t.shape[:2]
        half, quarter, eighth = (_repeat(m, states) for m in features.pyramid)
        embedding = self.embed(alpha_bar).repeat(states, 1)
        h4 = self.state(x_t.flatten(0, 1)) + quarter
        h8 = self.blocks[2](self.down(h4) + eighth, embedding)
        h4 = self.blocks[1](nearest(self.up[1](h8)) + h4, embedding)
        h = self.blocks[0](nearest(self.up[0](h4)) + half, embedding)

        weights = self.weights(h).float().unflatten(1, (fields.shape[2], -1)).unflatten(0, (states, 1, batch))
        shift = self.shift(h).float().unflatten(0, (states, 1, batch))
        with torch.autocast(h.device.type, enabled=False):  # noise in bf16 would be coarse
            weights = weights / weights.square().sum(4, keepdim=True).clamp_min(1e-12).sqrt()
            shared, fields = (noise.unflatten(0, (states, -1)) for noise in (shared, fields))
            mixed = torch.einsum("sobcn...,sdbcn->sdbc...", weights[:, :, :, :, :SHARED], shared)
            for scale in range(len(SPACINGS)):
                mixed.addcmul_(weights[:, :, :, :, SHARED + scale], fields[:, :, :, :, scale])
            signal = alpha_bar.sqrt().reshape(-1, *(1,) * (self.dims + 1))
            detail = SHARPNESS * (gumbel(mixed) + signal * shift)
        return _add_blocks(SHARPNESS * features.mean_logits.detach(), detail.flatten(0, 1))


class ConditionalNet(nn.Module):
    """Image encoder, mean head, denoiser.

    One call of the denoiser at pure noise draws a sample of the mask (distributional diffusion, De Bortoli et al.
    2025); the mean head gives the probability of every label in the same pass over the image.
    """

    def __init__(self, dims: int, channels: int, classes: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder = UNet(dims, channels, widths)
        self.mean_head = convolution(dims, widths[0], classes, kernel=1)
        self.denoiser = Denoiser(dims, classes, widths)

    def encode(self, image: Float[Tensor, "batch channels *space"]) -> Features:
        """Runs once an image."""
        decoded = self.encoder(image)
        mean_logits = self.mean_head(decoded[0])
        return Features(mean_logits.float(), self.denoiser.features(decoded))

    def forward(self, image: Float[Tensor, "batch channels *space"], *noise: Tensor) -> Tensor:
        """Logits of the mean head, [batch, classes, *space].

        With what the denoiser takes beside features: logits of every draw, which teach the denoiser alone.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not noise):
            decoded = self.encoder(image)
            mean_logits = self.mean_head(decoded[0]).float()
        if not noise:
            return mean_logits
        return self.denoiser(Features(mean_logits, self.denoiser.features(decoded)), *noise)


class SegmentationUNet(nn.Module):
    """The encoder and its head alone: the deterministic baseline, in the same house."""

    def __init__(self, dims: int, channels: int, classes: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder = UNet(dims, channels, widths)
        self.mean_head = convolution(dims, widths[0], classes, kernel=1)

    def encode(self, image: Float[Tensor, "batch channels *space"]) -> Features:
        """Logits alone; there is nothing to draw from."""
        return Features(self.mean_head(self.encoder(image)[0]).float(), ())

    def forward(self, image: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch classes *space"]:
        """Logits."""
        return self.encode(image).mean_logits


def _add_blocks(
    base: Float[Tensor, "batch classes *space"], detail: Float[Tensor, "draws batch classes *half"]
) -> Float[Tensor, "draws batch classes *space"]:
    """The sum, where a value of `detail` stands for a block of 2 voxels a side.

    Along the first axis it is never repeated, but added twice: as fast as the memory, nothing of full size in between.
    """
    for axis in range(4, detail.ndim):
        detail = detail.repeat_interleave(COARSE, axis)
    pairs = base.reshape(*base.shape[:2], detail.shape[3], COARSE, -1)
    return (pairs + detail.flatten(4)[:, :, :, :, None]).reshape(len(detail), *base.shape)


def _repeat(x: Tensor, draws: int) -> Tensor:
    return x.repeat(draws, *(1,) * (x.ndim - 1))
