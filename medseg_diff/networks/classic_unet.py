"""The U-Net of Ronneberger et al. 2015, and a denoiser of masks made of it."""

import itertools
import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from medseg_diff.networks.blocks import Condition, start_at_zero

Padding = Literal["valid", "same"]


def output_size(size: tuple[int, ...], levels: int, padding: Padding) -> tuple[int, ...]:
    """The size that comes out. ValueError, with the nearest sizes, for a side that does not fit.

    "valid" takes n where n + 4 is a multiple of 2 ** (levels - 1), so that every map is even before its pooling, and
    gives n - 12 * 2 ** (levels - 1) + 8; "same" takes multiples of 2 ** (levels - 1) and keeps them.
    """
    margin, stride = _margin(levels, padding), 2 ** (levels - 1)
    for side in size:
        larger = _fitting(side, levels, padding)
        if larger != side:
            smaller = [larger - stride] if larger - stride > margin else []
            nearest = " or ".join(map(str, [*smaller, larger]))
            raise ValueError(f"{levels} levels with {padding} padding can't take a side of {side}: make it {nearest}")
    return tuple(side - margin for side in size)


def _margin(levels: int, padding: Padding) -> int:
    """How much shorter a side comes out: four voxels at every level both ways, and four at the lowest."""
    return 12 * 2 ** (levels - 1) - 8 if padding == "valid" else 0


def _fitting(side: int, levels: int, padding: Padding) -> int:
    """The shortest side from `side` on that fits."""
    stride, offset = 2 ** (levels - 1), 4 if padding == "valid" else 0
    side = max(side, _margin(levels, padding) + 1)
    return side + (-side - offset) % stride


def crop(x: Float[Tensor, "batch channels *space"], size: tuple[int, ...]) -> Float[Tensor, "batch channels *smaller"]:
    """The central part of this size."""
    for axis, length in enumerate(size, start=2):
        x = x.narrow(axis, (x.shape[axis] - length) // 2, length)
    return x


def mirror(x: Float[Tensor, "batch channels *space"], size: tuple[int, ...]) -> Float[Tensor, "batch channels *larger"]:
    """Extended on all sides to this size by mirroring at the border voxel, again and again where need be (figure 2)."""
    for axis, length in enumerate(size, start=2):
        n = x.shape[axis]
        period = max(2 * (n - 1), 1)
        index = (torch.arange(length, device=x.device) - (length - n) // 2) % period
        x = x.index_select(axis, torch.minimum(index, period - index))
    return x


class TimestepEncoding(nn.Module):
    """A timestep as sines and cosines (Vaswani et al. 2017, section 3.5), through two layers.

    The network is told alpha_bar, not t, and encodes t = 1000 (2 / pi) acos(sqrt(alpha_bar)): from 0, no noise, to
    1000, noise alone, whatever the schedule.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", 10000 ** -torch.arange(0, 1, 2 / width), persistent=False)
        self.layers = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, alpha_bar: Float[Tensor, "batch"]) -> Float[Tensor, "batch width"]:
        """alpha_bar in [0, 1]."""
        t = 1000 * (2 / math.pi) * torch.acos(alpha_bar.clamp(0, 1).sqrt())
        phase = t[:, None] * self.frequencies
        return self.layers(torch.cat([phase.sin(), phase.cos()], dim=1))


class DoubleConvolution(nn.Module):
    """Two 3 x 3 convolutions, each with a ReLU; an embedding is added between the first and its ReLU."""

    def __init__(self, dims: int, inputs: int, outputs: int, padding: Padding, embedding: int) -> None:
        super().__init__()
        kind = nn.Conv2d if dims == 2 else nn.Conv3d
        self.conv1, self.conv2 = (kind(n, outputs, 3, padding=padding) for n in (inputs, outputs))
        self.time = nn.Linear(embedding, outputs) if embedding else None

    def forward(
        self, x: Float[Tensor, "batch inputs *space"], embedding: Float[Tensor, "batch width"] | None
    ) -> Float[Tensor, "batch outputs *smaller"]:
        """With "valid" padding four voxels shorter a side, else the same size."""
        h = self.conv1(x)
        if self.time is not None:
            h = h + self.time(embedding).reshape(*h.shape[:2], *(1,) * (h.ndim - 2))
        return functional.relu(self.conv2(functional.relu(h)))


class ClassicUNet(nn.Module):
    """The network of figure 1 in Ronneberger et al. 2015, over slices or volumes.

    Two unpadded convolutions a level, max pooling down, up-convolutions that halve the channels, skips cropped and
    concatenated, no normalization; weights drawn as in section 3 (He et al. 2015). The dropout that section 3.1
    mentions without a rate is left out. padding="same" keeps the size; with `embedding` > 0, its width, every level
    hears the noise level (see TimestepEncoding).
    """

    def __init__(
        self,
        dims: int,
        inputs: int,
        outputs: int,
        widths: tuple[int, ...] = (64, 128, 256, 512, 1024),
        *,
        padding: Padding = "valid",
        embedding: int = 0,
    ) -> None:
        super().__init__()
        self.padding = padding
        pairs = list(itertools.pairwise(widths))
        up = nn.ConvTranspose2d if dims == 2 else nn.ConvTranspose3d
        self.embed = TimestepEncoding(embedding) if embedding else None
        self.encoder = nn.ModuleList(
            DoubleConvolution(dims, a, b, padding, embedding) for a, b in itertools.pairwise((inputs, *widths))
        )
        self.pool = nn.MaxPool2d(2) if dims == 2 else nn.MaxPool3d(2)
        self.up = nn.ModuleList(up(coarse, fine, 2, stride=2) for fine, coarse in pairs)
        self.decoder = nn.ModuleList(DoubleConvolution(dims, 2 * w, w, padding, embedding) for w, _ in pairs)
        self.head = (nn.Conv2d if dims == 2 else nn.Conv3d)(widths[0], outputs, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
                transposed = isinstance(layer, nn.ConvTranspose2d | nn.ConvTranspose3d)
                # Kernel 2 at stride 2 does not overlap: a voxel of an up-convolution adds up one voxel's channels.
                fan_in = layer.in_channels if transposed else layer.weight[0].numel()
                nn.init.normal_(layer.weight, 0, math.sqrt(2 / fan_in))
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(
        self, x: Float[Tensor, "batch inputs *space"], alpha_bar: Float[Tensor, "batch"] | None = None
    ) -> Float[Tensor, "batch outputs *smaller"]:
        """Of the size that `output_size` tells. alpha_bar in [0, 1], if the network has an embedding."""
        output_size(tuple(x.shape[2:]), len(self.encoder), self.padding)
        embedding = None if self.embed is None else self.embed(alpha_bar)
        h, skips = self.encoder[0](x, embedding), []
        for block in self.encoder[1:]:
            skips.append(h)
            h = block(self.pool(h), embedding)
        for level in reversed(range(len(skips))):
            h = self.up[level](h)
            h = self.decoder[level](torch.cat([crop(skips[level], h.shape[2:]), h], dim=1), embedding)
        return self.head(h)


class ClassicDenoiser(nn.Module):
    """Image and noisy mask, concatenated, through a classic U-Net that hears the noise level: at every step anew.

    With "valid" padding the input is mirrored outwards until the output covers it (the paper's overlap-tile). That
    margin is 88 voxels a side for four levels and 184 for five: small images and volumes pay dearly for it.
    """

    def __init__(self, dims: int, channels: int, classes: int, widths: tuple[int, ...], *, padding: Padding) -> None:
        super().__init__()
        self.unet = ClassicUNet(dims, channels + classes, classes, widths, padding=padding, embedding=4 * widths[0])
        start_at_zero(self.unet.head)

    def encode(self, image: Float[Tensor, "batch channels *space"]) -> Condition:
        """The image itself: there is nothing to compute before the noise is known."""
        return Condition((image,), None)

    def denoise(
        self, condition: Condition, x_t: Float[Tensor, "batch classes *space"], alpha_bar: Float[Tensor, "batch"]
    ) -> Float[Tensor, "batch classes *space"]:
        """The network's output for x_t at the noise level alpha_bar."""
        size, levels, padding = tuple(x_t.shape[2:]), len(self.unet.encoder), self.unet.padding
        extended = tuple(_fitting(side + _margin(levels, padding), levels, padding) for side in size)
        x = mirror(torch.cat([*condition.maps, x_t], dim=1), extended)
        return crop(self.unet(x, alpha_bar), size).float()

    def forward(
        self,
        image: Float[Tensor, "batch channels *space"],
        x_t: Float[Tensor, "batch classes *space"],
        alpha_bar: Float[Tensor, "batch"],
    ) -> tuple[Float[Tensor, "batch classes *space"], Tensor | None]:
        """The output of `denoise`; no condition model, hence no logits."""
        condition = self.encode(image)
        return self.denoise(condition, x_t, alpha_bar), condition.logits
