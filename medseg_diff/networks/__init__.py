"""Networks, chosen by one `match`."""

from torch import nn

from medseg_diff.networks.conditional import ConditionalNet, SegmentationUNet
from medseg_diff.networks.unconditional import UnconditionalNet


def build_network(kind: str, dims: int, channels: int, classes: int, widths: tuple[int, ...]) -> nn.Module:
    """The network of `network.kind` for `dims` dimensions; `channels` of the image, `classes` with the background."""
    match kind:
        case "conditional":
            return ConditionalNet(dims, channels, classes, widths)
        case "unet":
            return SegmentationUNet(dims, channels, classes, widths)
        case "unconditional":
            return UnconditionalNet(dims, channels, widths)
    raise ValueError(f"no network of kind {kind}")
