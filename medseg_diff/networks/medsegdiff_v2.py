"""MedSegDiff, version 2 (Wu et al., AAAI 2024, arXiv 2301.11798), written from the paper."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from medseg_diff.networks.blocks import (
    GROUPS,
    Condition,
    LevelEmbedding,
    UNet,
    convolution,
    frequencies,
    from_spectrum,
    spectrum,
    start_at_zero,
)

HEAD = 8
"""Complex channels of an attention head."""


class AnchorCondition(nn.Module):
    """U-SA: the condition model's last feature f, blurred outwards, as a gate on the diffusion encoder's first stage.

    f_anc = max(f * k_Gauss, f); the gate is sigmoid(conv1x1(f_anc)) + 1. Every channel learns the standard deviation
    of its own Gaussian, in voxels and the same along all axes, within a window that reaches `radius` voxels.
    """

    def __init__(self, dims: int, width: int, radius: int = 3) -> None:
        super().__init__()
        self.log_sigma = nn.Parameter(torch.zeros(width))
        self.offsets: Tensor
        self.register_buffer("offsets", torch.arange(-radius, radius + 1).float(), persistent=False)
        self.project = convolution(dims, width, width, kernel=1)

    def kernel(self) -> Float[Tensor, "channels window"]:
        """The Gaussian along one axis, summing to 1; towards sigma = 0 it is the identity."""
        return torch.softmax(-0.5 * (self.offsets * torch.exp(-self.log_sigma)[:, None]) ** 2, dim=1)

    def blur(self, f: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch channels *space"]:
        """f * k_Gauss, one axis after the other; what lies beyond the border is as the border."""
        axes, reach, kernel = f.ndim - 2, len(self.offsets) // 2, self.kernel()
        convolve = functional.conv2d if axes == 2 else functional.conv3d
        f = functional.pad(f, (reach,) * (2 * axes), mode="replicate")
        for axis in range(axes):
            weight = kernel.reshape(len(kernel), 1, *(-1 if axis == k else 1 for k in range(axes)))
            f = convolve(f, weight, groups=len(kernel))
        return f

    def forward(self, f: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch channels *space"]:
        """The gate, between 1 and 2."""
        return 1 + torch.sigmoid(self.project(torch.maximum(self.blur(f), f)))


class NeuralBandPass(nn.Module):
    """NBP filter: a small network that gives every frequency a gate in (0, 1), modulated by the noise level.

    It sees cos(2 pi k f) for k = 1 to `waves` along every axis, f in cycles a voxel: even in f, so that the filter is
    real and shifts nothing, and the same filter at every size. The embedding scales and shifts the hidden layer as in
    AdaIN, without AdaIN's normalization, which a bottleneck of one voxel would not survive.
    """

    def __init__(self, dims: int, channels: int, embedding: int, waves: int = 4, hidden: int = 32) -> None:
        super().__init__()
        self.waves: Tensor
        self.register_buffer("waves", torch.arange(1, waves + 1).float(), persistent=False)
        self.enter, self.leave = nn.Linear(dims * waves, hidden), nn.Linear(hidden, channels)
        self.film = nn.Linear(embedding, 2 * hidden)

    def forward(
        self, size: tuple[int, ...], embedding: Float[Tensor, "batch width"]
    ) -> Float[Tensor, "batch channels *frequencies"]:
        """Gates for the spectrum of maps of this size."""
        grid = torch.stack(torch.meshgrid(*frequencies(size, embedding.device), indexing="ij"), dim=-1)
        positions = torch.cos(2 * math.pi * grid[..., None] * self.waves).flatten(-2)
        scale, shift = self.film(embedding).reshape(len(embedding), *(1,) * len(size), -1).chunk(2, dim=-1)
        gate = self.leave(functional.silu(self.enter(positions) * (1 + scale) + shift))
        return torch.sigmoid(gate.float()).movedim(-1, 1)


class SpectralAttention(nn.Module):
    """A block of SS-Former: one map asks another, frequency by frequency; filtered, the answer is added to the first.

    Queries, keys and values are the spectra of 1 x 1 convolutions; affinity is the real part of the product of query
    and conjugate key. The NBP filter gates the spectrum of the answer. A perceptron a voxel follows, as in any
    transformer.
    """

    def __init__(self, dims: int, width: int, embedding: int) -> None:
        super().__init__()
        self.norm_query, self.norm_key = nn.GroupNorm(1, width), nn.GroupNorm(1, width)
        self.query, self.key, self.value, self.leave = (convolution(dims, width, width, kernel=1) for _ in range(4))
        self.band_pass = NeuralBandPass(dims, width, embedding)
        last = convolution(dims, 2 * width, width, kernel=1)
        self.perceptron = nn.Sequential(
            nn.GroupNorm(1, width), convolution(dims, width, 2 * width, kernel=1), nn.SiLU(), last
        )
        start_at_zero(self.leave)
        start_at_zero(last)

    def forward(
        self,
        asking: Float[Tensor, "batch channels *space"],
        asked: Float[Tensor, "batch channels *space"],
        embedding: Float[Tensor, "batch width"],
    ) -> Float[Tensor, "batch channels *space"]:
        """`asking` gives the queries, `asked` keys and values."""
        size, source = tuple(asking.shape[2:]), self.norm_key(asked)
        spectra = [spectrum(m) for m in (self.query(self.norm_query(asking)), self.key(source), self.value(source))]
        query, key, value = (_tokens(s) for s in spectra)
        answer = functional.scaled_dot_product_attention(query, key, value).float()
        answer = torch.view_as_complex(answer.unflatten(-1, (HEAD, 2)).contiguous())
        answer = answer.transpose(2, 3).reshape(spectra[0].shape) * self.band_pass(size, embedding)
        h = asking + self.leave(from_spectrum(answer, size))
        return h + self.perceptron(h)


def _tokens(x: Tensor) -> Tensor:
    """A spectrum as [batch, heads, frequencies, 2 HEAD] real numbers."""
    return torch.view_as_real(x.flatten(2).unflatten(1, (-1, HEAD)).transpose(2, 3).contiguous()).flatten(-2)


class MedSegDiffV2(nn.Module):
    """A condition model, which is a full U-Net of the image with a head of its own, and a diffusion U-Net of x_t.

    They meet twice. Where the diffusion encoder begins, an anchor gate d' = sigmoid(conv1x1(f_anc)) d + d points out
    where the condition model sees structures; at the bottleneck, SS-Former exchanges semantics. Neither is detached:
    the diffusion loss teaches the condition model too, beside the loss of its logits.

    What the paper leaves open, and what was chosen: the anchor acts on the first convolution's output, so that
    everything after sees it. SS-Former is two blocks in a chain: the condition's bottleneck asks the noise's, then the
    noise's asks the answer, and the diffusion decoder goes on with that. The filter gates the attention's answer,
    which has frequencies, and not the affinities, which pair them. Heads are HEAD complex channels wide.
    """

    def __init__(self, dims: int, channels: int, classes: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        embedding = 4 * widths[0]
        self.condition = UNet(dims, channels, widths)
        self.condition_head = convolution(dims, widths[0], classes, kernel=1)
        self.anchor = AnchorCondition(dims, widths[0])
        self.embed = LevelEmbedding(embedding)
        self.diffusion = UNet(dims, classes, widths, embedding)
        self.condition_asks, self.noise_asks = (SpectralAttention(dims, widths[-1], embedding) for _ in range(2))
        self.norm = nn.GroupNorm(GROUPS, widths[0])
        self.head = convolution(dims, widths[0], classes)
        start_at_zero(self.head)

    def encode(self, image: Float[Tensor, "batch channels *space"]) -> Condition:
        """Runs once an image: the anchor's gate, the condition model's bottleneck, and its logits."""
        features = self.condition(image)
        return Condition((self.anchor(features[0]), features[-1]), self.condition_head(features[0]).float())

    def denoise(
        self, condition: Condition, x_t: Float[Tensor, "batch classes *space"], alpha_bar: Float[Tensor, "batch"]
    ) -> Float[Tensor, "batch classes *space"]:
        """The network's output for x_t at the noise level alpha_bar; each side a multiple of 2 ** (levels - 1)."""
        gate, semantics = condition.maps
        embedding = self.embed(alpha_bar)
        skips = self.diffusion.encode(gate * self.diffusion.stem(x_t), embedding)
        semantics = self.condition_asks(semantics, skips[-1], embedding)
        skips[-1] = self.noise_asks(skips[-1], semantics, embedding)
        h = self.diffusion.decode(skips, embedding)[0]
        return self.head(functional.silu(self.norm(h))).float()

    def forward(
        self,
        image: Float[Tensor, "batch channels *space"],
        x_t: Float[Tensor, "batch classes *space"],
        alpha_bar: Float[Tensor, "batch"],
    ) -> tuple[Float[Tensor, "batch classes *space"], Tensor | None]:
        """The output of `denoise`, and the condition model's logits."""
        condition = self.encode(image)
        return self.denoise(condition, x_t, alpha_bar), condition.logits
