"""MedSegDiff, version 1 (Wu et al., MIDL 2023, arXiv 2211.00611), written from the paper."""

import itertools

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from medseg_diff.networks.blocks import (
    GROUPS,
    Condition,
    LevelEmbedding,
    ResidualBlock,
    UNet,
    convolution,
    frequencies,
    from_spectrum,
    spectrum,
    start_at_zero,
)


class FFParser(nn.Module):
    """Fourier transform, a learned complex weight a channel and frequency, and back. It starts as the identity.

    The weights lie on the frequencies of maps of the training size. For other sizes they are interpolated linearly
    between frequencies in cycles a voxel, so that a filter stays the same filter.
    """

    def __init__(self, channels: int, size: tuple[int, ...]) -> None:
        super().__init__()
        self.size = size
        weight = torch.ones(channels, *size[:-1], size[-1] // 2 + 1, dtype=torch.complex64)
        self.weight = nn.Parameter(torch.view_as_real(weight).clone())

    def weight_for(self, size: tuple[int, ...]) -> Float[Tensor, "channels *frequencies 2"]:
        """Real and imaginary parts for maps of this size."""
        if size == self.size:
            return self.weight
        weight: Tensor = self.weight
        for axis, (f, n) in enumerate(zip(frequencies(size, weight.device), self.size, strict=True), start=1):
            stored = weight.shape[axis]
            position = f * n % n
            low = position.floor()
            fraction = (position - low).reshape(-1, *(1,) * (weight.ndim - axis - 1))
            # A whole axis of frequencies closes to a circle, half of one ends at the highest.
            low, high = ((i % n if stored == n else i.clamp(max=stored - 1)).long() for i in (low, low + 1))
            weight = torch.lerp(weight.index_select(axis, low), weight.index_select(axis, high), fraction)
        return weight

    def forward(self, x: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch channels *space"]:
        """The filtered map, in float32."""
        size = tuple(x.shape[2:])
        return from_spectrum(spectrum(x) * torch.view_as_complex(self.weight_for(size)), size)


def attentive_fusion(
    m_image: Float[Tensor, "batch channels *space"], m_state: Float[Tensor, "batch channels *space"]
) -> Float[Tensor, "batch channels *space"]:
    """Dynamic conditional encoding, A(m_I, m_x) = (LN(m_I) * LN(m_x)) * m_I, voxel by voxel.

    LN is over channels and space together, without weights of its own: over the channels of each voxel, it would lift
    an empty place to the strength of all others, and the next convolution can scale what it needs.
    """
    return functional.group_norm(m_image, 1) * functional.group_norm(m_state, 1) * m_image


class MedSegDiffV1(nn.Module):
    """Two encoders, of the image and of x_t, that meet at the bottleneck; one decoder; all told the noise level.

    In the middle two stages the image's features are replaced by their fusion with those of x_t, which an FF-Parser
    has filtered. So the image branch depends on x_t, and everything runs anew at every step.

    What the paper leaves open, and what was chosen: the middle stages are the second and third of four or five; the
    decoder's skips are the sum of both encoders' features, as the bottleneck is; the blocks are those of our `UNet`;
    FF-Parser's weights are complex (see there), the normalization is explained at `attentive_fusion`.
    """

    def __init__(self, dims: int, channels: int, classes: int, widths: tuple[int, ...], size: tuple[int, ...]) -> None:
        """`size` of the images in training, in voxels."""
        super().__init__()
        embedding, middle = 4 * widths[0], len(widths) // 2
        self.embed = LevelEmbedding(embedding)
        self.image_stem = convolution(dims, channels, widths[0])
        self.image_encoder = nn.ModuleList(ResidualBlock(dims, w, w, embedding) for w in widths)
        self.image_down = nn.ModuleList(
            convolution(dims, fine, coarse, stride=2) for fine, coarse in itertools.pairwise(widths)
        )
        self.parsers = nn.ModuleDict(
            {str(k): FFParser(widths[k], tuple(n // 2**k for n in size)) for k in (middle - 1, middle)}
        )
        self.unet = UNet(dims, classes, widths, embedding)
        self.norm = nn.GroupNorm(GROUPS, widths[0])
        self.head = convolution(dims, widths[0], classes)
        start_at_zero(self.head)

    def encode(self, image: Float[Tensor, "batch channels *space"]) -> Condition:
        """The image itself: its features depend on x_t."""
        return Condition((image,), None)

    def features(
        self, image: Tensor, x_t: Tensor, embedding: Float[Tensor, "batch width"]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Feature maps of both encoders, the finest first: of the image, and of x_t."""
        m_image, m_state = self.image_stem(image), self.unet.stem(x_t)
        of_image, of_state = [], []
        for level in range(len(self.image_encoder)):
            if level > 0:
                m_image, m_state = self.image_down[level - 1](m_image), self.unet.down[level - 1](m_state)
            m_image = self.image_encoder[level](m_image, embedding)
            m_state = self.unet.encoder[level](m_state, embedding)
            if str(level) in self.parsers:
                m_image = attentive_fusion(m_image, self.parsers[str(level)](m_state))
            of_image.append(m_image)
            of_state.append(m_state)
        return of_image, of_state

    def denoise(
        self, condition: Condition, x_t: Float[Tensor, "batch classes *space"], alpha_bar: Float[Tensor, "batch"]
    ) -> Float[Tensor, "batch classes *space"]:
        """The network's output for x_t at the noise level alpha_bar; each side a multiple of 2 ** (levels - 1)."""
        (image,), embedding = condition.maps, self.embed(alpha_bar)
        of_image, of_state = self.features(image, x_t, embedding)
        skips = [m_image + m_state for m_image, m_state in zip(of_image, of_state, strict=True)]
        h = self.unet.decode(skips, embedding)[0]
        return self.head(functional.silu(self.norm(h))).float()

    def forward(
        self,
        image: Float[Tensor, "batch channels *space"],
        x_t: Float[Tensor, "batch classes *space"],
        alpha_bar: Float[Tensor, "batch"],
    ) -> tuple[Float[Tensor, "batch classes *space"], Tensor | None]:
        """The output of `denoise`; no condition model, hence no logits."""
        condition = self.encode(image)
        return self.denoise(condition, x_t, alpha_bar), condition.logits
