"""Blocks of the networks, for slices and volumes alike: `dims` is 2 or 3."""

import itertools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn
from torch.nn import functional

GROUPS = 8


@dataclass(frozen=True)
class Condition:
    """What denoising a mask needs of an image, computed once, and the condition model's own mask where it has one."""

    maps: tuple[Tensor, ...]
    logits: Tensor | None


def convolution(dims: int, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d | nn.Conv3d:
    """A convolution padded so that stride 1 keeps the size and stride 2 halves it."""
    kind = nn.Conv2d if dims == 2 else nn.Conv3d
    return kind(inputs, outputs, kernel, stride=stride, padding=(kernel - 1) // 2)


def start_at_zero(layer: nn.Conv2d | nn.Conv3d | nn.Linear) -> None:
    """Zero weights and bias: the branch that ends here is silent at first."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def upsample(x: Float[Tensor, "batch channels *space"], factor: int = 2) -> Float[Tensor, "batch channels *larger"]:
    """Linear interpolation."""
    mode = "bilinear" if x.ndim == 4 else "trilinear"
    return functional.interpolate(x, scale_factor=factor, mode=mode, align_corners=False)


def nearest(x: Float[Tensor, "batch channels *space"], factor: int = 2) -> Float[Tensor, "batch channels *larger"]:
    """Repetition of every voxel."""
    return functional.interpolate(x, scale_factor=factor, mode="nearest")


def spectrum(x: Float[Tensor, "batch channels *space"]) -> Complex[Tensor, "batch channels *frequencies"]:
    """Fourier transform over space, half of the last axis; in float32, as no transform takes bfloat16."""
    return torch.fft.rfftn(x.float(), dim=tuple(range(2, x.ndim)), norm="ortho")


def from_spectrum(
    x: Complex[Tensor, "batch channels *frequencies"], size: tuple[int, ...]
) -> Float[Tensor, "batch channels *space"]:
    """Back to a map of this size, which half a spectrum leaves open."""
    return torch.fft.irfftn(x, s=size, dim=tuple(range(2, x.ndim)), norm="ortho")


def frequencies(size: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Cycles a voxel along each axis of the spectrum of a map of this size."""
    *full, half = size
    return (*(torch.fft.fftfreq(n, device=device) for n in full), torch.fft.rfftfreq(half, device=device))


class LevelEmbedding(nn.Module):
    """A noise level as a vector: its angle on the circle (sqrt(abar), sqrt(1 - abar)), as waves, through two layers."""

    def __init__(self, width: int, frequencies: int = 8) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.arange(1, frequencies + 1).float(), persistent=False)
        self.layers = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, alpha_bar: Float[Tensor, "batch"]) -> Float[Tensor, "batch width"]:
        """alpha_bar in [0, 1]."""
        angle = torch.acos(alpha_bar.clamp(0, 1).sqrt()) * (2 / math.pi)
        phase = math.pi * angle[:, None] * self.frequencies
        return self.layers(torch.cat([phase.sin(), phase.cos()], dim=1))


class ResidualBlock(nn.Module):
    """Two convolutions beside a skip; the second starts at zero. An embedding scales and shifts between them (FiLM)."""

    def __init__(self, dims: int, inputs: int, outputs: int, embedding: int = 0) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(GROUPS, inputs), convolution(dims, inputs, outputs)
        self.norm2, self.conv2 = nn.GroupNorm(GROUPS, outputs), convolution(dims, outputs, outputs)
        self.skip = nn.Identity() if inputs == outputs else convolution(dims, inputs, outputs, kernel=1)
        self.film = nn.Linear(embedding, 2 * outputs) if embedding else None
        start_at_zero(self.conv2)

    def forward(
        self, x: Float[Tensor, "batch inputs *space"], embedding: Float[Tensor, "batch width"] | None = None
    ) -> Float[Tensor, "batch outputs *space"]:
        """Same size out as in."""
        h = self.norm2(self.conv1(functional.silu(self.norm1(x))))
        if self.film is not None:
            scale, shift = self.film(embedding).reshape(len(x), -1, *(1,) * (x.ndim - 2)).chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return self.skip(x) + self.conv2(functional.silu(h))


class UNet(nn.Module):
    """Residual U-Net without a head: returns the decoder's feature maps, the finest first.

    Ronneberger et al. 2015 in outline; strided convolutions down, nearest neighbour and 1 x 1 convolution up, skips
    added and not concatenated (Myronenko 2018): at the finest level that saves half of the decoder's work.
    """

    def __init__(self, dims: int, inputs: int, widths: tuple[int, ...], embedding: int = 0) -> None:
        super().__init__()
        self.stem = convolution(dims, inputs, widths[0])
        self.encoder = nn.ModuleList(ResidualBlock(dims, w, w, embedding) for w in widths)
        pairs = list(itertools.pairwise(widths))
        self.down = nn.ModuleList(convolution(dims, fine, coarse, stride=2) for fine, coarse in pairs)
        self.up = nn.ModuleList(convolution(dims, coarse, fine, kernel=1) for fine, coarse in pairs)
        self.decoder = nn.ModuleList(ResidualBlock(dims, fine, fine, embedding) for fine, _ in pairs)

    def forward(
        self, x: Float[Tensor, "batch inputs *space"], embedding: Float[Tensor, "batch width"] | None = None
    ) -> list[Tensor]:
        """Every length of `space` is a multiple of 2 ** (levels - 1)."""
        return self.decode(self.encode(self.stem(x), embedding), embedding)

    def encode(self, h: Tensor, embedding: Float[Tensor, "batch width"] | None = None) -> list[Tensor]:
        """The way down alone, from the stem's output: the encoder's feature maps, the finest first."""
        skips = []
        for block, down in zip(self.encoder, [*self.down, None], strict=True):
            h = block(h, embedding)
            skips.append(h)
            h = down(h) if down is not None else h
        return skips

    def decode(self, skips: list[Tensor], embedding: Float[Tensor, "batch width"] | None = None) -> list[Tensor]:
        """The way up alone, from the encoder's feature maps, the finest first."""
        features = [skips[-1]]
        for level in reversed(range(len(self.decoder))):
            h = nearest(self.up[level](features[0])) + skips[level]
            features.insert(0, self.decoder[level](h, embedding))
        return features
