"""Networks, chosen by one `match`."""

from typing import Literal

from torch import nn

from medseg_diff.networks.blocks import start_at_zero
from medseg_diff.networks.classic_unet import ClassicDenoiser, ClassicUNet
from medseg_diff.networks.conditional import ConditionalNet, SegmentationUNet
from medseg_diff.networks.medsegdiff_v1 import MedSegDiffV1
from medseg_diff.networks.medsegdiff_v2 import MedSegDiffV2
from medseg_diff.networks.unconditional import UnconditionalNet


def build_network(
    kind: str,
    dims: int,
    channels: int,
    classes: int,
    widths: tuple[int, ...],
    *,
    size: tuple[int, ...],
    padding: Literal["same", "valid"] = "same",
) -> nn.Module:
    """The network of `network.kind` that segments images of `channels` into `classes`, the background among them.

    `size` is the training size in voxels, where the filters of medsegdiff_v1 over frequencies are learned.
    """
    match kind:
        case "conditional":
            return ConditionalNet(dims, channels, classes, widths)
        case "unet":
            return SegmentationUNet(dims, channels, classes, widths)
        case "classic_unet":
            return ClassicDenoiser(dims, channels, classes, widths, padding=padding)
        case "medsegdiff_v1":
            return MedSegDiffV1(dims, channels, classes, widths, size)
        case "medsegdiff_v2":
            return MedSegDiffV2(dims, channels, classes, widths)
    raise ValueError(f"no network of kind {kind} segments")


def build_generator(kind: str, dims: int, inputs: int, outputs: int, widths: tuple[int, ...]) -> nn.Module:
    """The network of `network.kind` that denoises images; with pairs the channels of the mask are among `inputs`."""
    match kind:
        case "unconditional":
            return UnconditionalNet(dims, inputs, outputs, widths)
        case "classic_unet":
            network = ClassicUNet(dims, inputs, outputs, widths, padding="same", embedding=4 * widths[0])
            start_at_zero(network.head)
            return network
    raise ValueError(f"no network of kind {kind} generates")
