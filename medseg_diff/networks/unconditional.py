"""A denoiser of images: the diffusion process without a condition."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from medseg_diff.networks.blocks import GROUPS, LevelEmbedding, UNet, convolution, start_at_zero


class UnconditionalNet(nn.Module):
    """Residual U-Net that hears the noise level; as many outputs as inputs, or twice as many to learn the variance."""

    def __init__(self, dims: int, inputs: int, outputs: int, widths: tuple[int, ...], embedding: int = 128) -> None:
        super().__init__()
        self.embed = LevelEmbedding(embedding)
        self.unet = UNet(dims, inputs, widths, embedding)
        self.norm = nn.GroupNorm(GROUPS, widths[0])
        self.head = convolution(dims, widths[0], outputs)
        start_at_zero(self.head)

    def forward(
        self, x_t: Float[Tensor, "batch inputs *space"], alpha_bar: Float[Tensor, "batch"]
    ) -> Float[Tensor, "batch outputs *space"]:
        """What the configuration wants predicted (velocity, x_0 or noise) at the noise level alpha_bar."""
        h = self.unet(x_t, self.embed(alpha_bar))[0]
        return self.head(functional.silu(self.norm(h))).float()
