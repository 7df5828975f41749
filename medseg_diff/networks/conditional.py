"""Encode once, denoise lightly: an image encoder that never sees the noise, and a small denoiser that draws masks."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from medseg_diff.networks.blocks import (
    LevelEmbedding,
    ResidualBlock,
    UNet,
    convolution,
    nearest,
    start_at_zero,
    upsample,
)

STRIDE = 4
"""The noisy mask and the noise live on a grid this many times coarser than the image's."""

READOUT = (8, 16, 32, 32)
"""Channels of the image's features at strides 1, 2, 4 and 8, as the denoiser sees them."""


@dataclass(frozen=True)
class Features:
    """What the denoiser needs of an image, computed once."""

    mean_logits: Float[Tensor, "batch classes *space"]
    pyramid: tuple[Tensor, ...]


class Denoiser(nn.Module):
    """Draws clean masks from a noisy low-resolution one. No convolution runs at full resolution."""

    def __init__(self, dims: int, classes: int, widths: tuple[int, ...], embedding: int = 64) -> None:
        super().__init__()
        fine, half, quarter, eighth = READOUT
        self.project = nn.ModuleList(
            convolution(dims, width + (classes if level == 0 else 0), out, kernel=1)
            for level, (width, out) in enumerate(zip(widths, READOUT, strict=False))
        )
        self.embed = LevelEmbedding(embedding)
        self.state, self.noise = (
            nn.Sequential(convolution(dims, classes, quarter), nn.SiLU(), convolution(dims, quarter, quarter))
            for _ in range(2)
        )
        self.down = convolution(dims, quarter, eighth, stride=2)
        self.blocks = nn.ModuleList(ResidualBlock(dims, w, w, embedding) for w in (half, quarter, eighth))
        self.up = nn.ModuleList(convolution(dims, a, b, kernel=1) for a, b in ((quarter, half), (eighth, quarter)))
        self.head = convolution(dims, half, classes, kernel=1)
        self.readout = nn.Linear(embedding, classes * fine)
        start_at_zero(self.head)
        start_at_zero(self.readout)

    def features(self, mean_logits: Tensor, decoded: list[Tensor]) -> tuple[Tensor, ...]:
        """The projected pyramid. It sees the mean head's answer, and doesn't teach the head."""
        maps = [torch.cat([decoded[0], mean_logits.detach().softmax(1)], dim=1), *decoded[1 : len(READOUT)]]
        return tuple(layer(m) for layer, m in zip(self.project, maps, strict=True))

    def forward(
        self,
        features: Features,
        x_t: Float[Tensor, "draws batch classes *coarse"],
        alpha_bar: Float[Tensor, "batch"],
        noise: Float[Tensor, "draws batch classes *coarse"],
    ) -> Float[Tensor, "draws batch classes *space"]:
        """Logits of every draw. x_t comes scaled, so that it is 0 at pure noise, where `noise` is x_T itself.

        The mean head's logits are the base, and are not taught here: cross-entropy alone keeps them calibrated.
        """
        draws = len(noise)
        fine, half, quarter, eighth = features.pyramid
        embedding = self.embed(alpha_bar)
        flat_embedding = embedding.repeat(draws, 1)
        coarse = self.state(x_t.flatten(0, 1)) + self.noise(noise.flatten(0, 1))
        h = self.blocks[2](self.down(coarse) + _repeat(eighth, draws), flat_embedding)
        h = self.blocks[1](nearest(self.up[1](h)) + coarse + _repeat(quarter, draws), flat_embedding)
        h = self.blocks[0](nearest(self.up[0](h)) + _repeat(half, draws), flat_embedding)
        weights = self.readout(embedding).unflatten(1, (-1, fine.shape[1])).to(fine.dtype)
        base = features.mean_logits.detach() + torch.einsum("bkc,bc...->bk...", weights, fine)
        logits = upsample(self.head(h).float())
        return base.float() + logits.unflatten(0, (draws, -1))


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
        return Features(mean_logits.float(), self.denoiser.features(mean_logits, decoded))

    def forward(
        self,
        image: Float[Tensor, "batch channels *space"],
        x_t: Float[Tensor, "draws batch classes *coarse"],
        alpha_bar: Float[Tensor, "batch"],
        noise: Float[Tensor, "draws batch classes *coarse"],
    ) -> tuple[Float[Tensor, "batch classes *space"], Float[Tensor, "draws batch classes *space"]]:
        """Logits of the mean head, and of every draw."""
        features = self.encode(image)
        return features.mean_logits, self.denoiser(features, x_t, alpha_bar, noise)


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


def _repeat(x: Tensor, draws: int) -> Tensor:
    return x.repeat(draws, *(1,) * (x.ndim - 1))
