"""A denoiser of images: the diffusion process without a condition."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from medseg_diff.networks.blocks import GROUPS, LevelEmbedding, UNet, convolution, start_at_zero


class UnconditionalNet(nn.Module):
    """U-Net that predicts the velocity v of an image (Salimans & Ho 2022, appendix D)."""

    def __init__(self, dims: int, channels: int, widths: tuple[int, ...], embedding: int = 128) -> None:
        super().__init__()
        self.embed = LevelEmbedding(embedding)
        self.unet = UNet(dims, channels, widths, embedding)
        self.norm = nn.GroupNorm(GROUPS, widths[0])
        self.head = convolution(dims, widths[0], channels)
        start_at_zero(self.head)

    def forward(
        self, x_t: Float[Tensor, "batch channels *space"], alpha_bar: Float[Tensor, "batch"]
    ) -> Float[Tensor, "batch channels *space"]:
        """Velocity at the noise level alpha_bar."""
        h = self.unet(x_t, self.embed(alpha_bar))[0]
        return self.head(functional.silu(self.norm(h))).float()
