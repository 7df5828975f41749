"""The configuration: the only home of defaults. A field's docstring is its documentation."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Data(_Section):
    """Which cases, and how a scan becomes the grid that the network sees."""

    root: Path
    """Folder of a data set in the Decathlon layout, holding dataset.json."""
    folds: Annotated[int, Field(ge=2)] = 5
    """Cases sorted by name; fold f validates on those whose index i has i % folds == f."""
    fold: Annotated[int, Field(ge=0)] = 0
    """The fold that validates."""
    cache: Path = Path("runs/.cache")
    """Where preprocessed volumes are kept; may be deleted at any time."""
    modality: Literal["ct", "mr"] = "mr"
    """ct: a window in Hounsfield units, mapped to [-1, 1]. mr: clipped at percentiles, then mean 0 and variance 1."""
    window_hu: tuple[Finite, Finite] = (-160.0, 240.0)
    """Lowest and highest Hounsfield unit that ct keeps."""
    percentiles: tuple[Annotated[float, Field(ge=0, lt=50)], Annotated[float, Field(ge=50, le=100)]] = (0.5, 99.5)
    """Lowest and highest percentile of the intensities that mr keeps."""
    spacing_mm: tuple[Positive, Positive, Positive] | None = None
    """Voxel size of the network's grid along right, anterior, superior; null: the median of the training cases."""
    spatial_dims: Literal[2, 3] = 3
    """2: slices, 3: volumes."""
    axis: Literal[0, 1, 2] = 2
    """With 2 dimensions: the axis across the slices (0 sagittal, 1 coronal, 2 axial)."""
    neighbours: Annotated[int, Field(ge=0, le=8)] = 1
    """With 2 dimensions: slices on either side that are given as further channels."""
    size: tuple[Annotated[int, Field(ge=16, le=4096, multiple_of=16)], ...]
    """Training size in voxels of the network's grid, one number a dimension, multiples of 16."""
    foreground: Share = 0.5
    """Share of the training crops that are centred on a labelled voxel."""
    pairs: bool = False
    """With task generate: the mask is generated with the image, as further channels of the same diffusion."""


class Network(_Section):
    """The network."""

    kind: Literal["conditional", "unet", "unconditional", "classic_unet", "medsegdiff_v1", "medsegdiff_v2"] = (
        "conditional"
    )
    """conditional: image encoder, mean head and a denoiser that draws masks in one call. unet: the encoder and its head
    alone, trained by Dice and cross-entropy. medsegdiff_v1, medsegdiff_v2: denoisers of masks as in the papers.
    classic_unet: the U-Net of 2015 as a denoiser, of masks or with task generate of images. unconditional: a denoiser
    of images, for task generate."""
    padding: Literal["same", "valid"] = "same"
    """Of classic_unet: same keeps the size; valid is the paper's, on an image that is extended by mirroring."""
    widths: Annotated[
        tuple[Annotated[int, Field(ge=8, le=4096, multiple_of=8)], ...], Field(min_length=4, max_length=5)
    ] = (
        16,
        32,
        64,
        128,
    )
    """Channels at each of the 4 or 5 levels, the finest first."""


class Diffusion(_Section):
    """The diffusion process."""

    schedule: Literal["linear", "quadratic", "cosine", "sigmoid", "scaled_linear"] = "cosine"
    """Noise schedule."""
    zero_terminal: bool = True
    """The schedule is rescaled to end in pure noise (zero terminal SNR)."""
    log_snr_shift: Finite = 0.0
    """Added to the schedule's log-SNR; below 0 there is more noise at every time, as large images need."""
    train_steps: Annotated[int, Field(ge=2)] = 1000
    """Number of noise levels that training draws from."""
    scale: Positive = 0.5
    """b: analog masks live in [-b, b]."""
    pure_noise: Share = 0.5
    """Share of the training levels that are pure noise, the level at which one call draws a sample."""
    draws: Annotated[int, Field(ge=2)] = 4
    """Of conditional: masks drawn for one training image, which the energy score compares."""
    prediction: Literal["velocity", "x0", "noise"] = "velocity"
    """What the other denoisers predict."""
    weighting: Literal["uniform", "min_snr", "level"] = "uniform"
    """Weight of a noise level in their squared error: of the prediction itself, min-SNR-5, or EDM's."""
    variance: Literal["small", "large", "learned"] = "small"
    """Of ancestral sampling; learned is for task generate, and is trained by the variational bound."""


class Train(_Section):
    """Optimization."""

    steps: Count = 100_000
    """Budget in optimizer steps."""
    max_minutes: Positive | None = None
    """Budget in minutes of training; whichever of the two ends first."""
    batch_size: Count = 2
    """Crops, or slices, in a forward pass."""
    accumulate: Count = 1
    """Forward passes whose gradients are gathered for one step."""
    lr: Positive = 2e-3
    """Highest learning rate of AdamW, reached after the warm-up, then lowered along a cosine."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    """Weight decay of AdamW."""
    warmup: Share = 0.1
    """Share of the budget in which the learning rate rises."""
    clip: Positive = 1.0
    """Largest norm of the gradient."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of the moving average of the weights, the ones that are kept."""
    mean_weight: Positive = 5.0
    """Of conditional: weight of the mean head's cross-entropy beside the energy score."""
    condition_every: Count = 5
    """Of medsegdiff_v2: every so many steps Dice and cross-entropy teach the condition model."""
    augment: bool = True
    """Rotate, scale, shift, and change the intensities of what is trained on."""
    checkpoint_every: Count = 200
    """Steps between two states to resume from."""
    validations: Count = 4
    """Validations over the budget, evenly spaced, the last one at its end."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on CUDA and on processors that are fast in it, fp32 elsewhere."""


class Segment(_Section):
    """Sampling."""

    samples: Annotated[int, Field(ge=2, le=1024)] = 16
    """Masks (or images to preview) drawn by default."""
    steps: Count = 1
    """Steps of the sampler; a step calls the denoiser once (twice with heun)."""
    sampler: Literal["auto", "ddpm", "ddim", "dpm++", "dpm++sde", "heun"] = "auto"
    """auto: ddpm for conditional, which draws at every call, and dpm++ for the others, which estimate the mean."""
    eta: Share = 0.0
    """Of ddim: share of fresh noise."""
    spacing: Literal["trailing", "leading", "linspace", "log_snr"] = "trailing"
    """How the steps lie on the schedule."""
    limit: Literal["none", "clip", "dynamic"] = "none"
    """What keeps estimates within the range of masks (or of ct images): clipping, or dynamic thresholding."""
    fuse: Literal["mean", "vote", "staple"] = "mean"
    """How medsegdiff_v1, medsegdiff_v2 and classic_unet report their samples; conditional reports its mean head."""


class Tracking(_Section):
    """MLflow."""

    uri: str = "sqlite:///mlflow.db"
    """Tracking store: sqlite:///FILE or the address of a server."""
    experiment: str = "medseg-diff"
    """Experiment that the runs belong to."""


MASK_DENOISERS = ("classic_unet", "medsegdiff_v1", "medsegdiff_v2")
"""Kinds that estimate a mask from a noisy one at full resolution."""

PREDICTING = (*MASK_DENOISERS, "unconditional")
"""Kinds that follow diffusion.prediction."""

SAMPLING = ("conditional", *MASK_DENOISERS)
"""Kinds that draw several masks of a scan."""

SERVES = {"segment": (*SAMPLING, "unet"), "generate": ("unconditional", "classic_unet")}


class Config(_Section):
    """Everything that decides what a run does."""

    task: Literal["segment", "generate"] = "segment"
    """segment: masks from scans. generate: images from noise."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of the weights, the order of the data and the noise."""
    data: Data
    network: Network = Network()
    diffusion: Diffusion = Diffusion()
    train: Train = Train()
    segment: Segment = Segment()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        data = self.data
        if data.fold >= data.folds:
            raise ValueError(f"data.fold: {data.fold} is not below data.folds, {data.folds}")
        if len(data.size) != data.spatial_dims:
            raise ValueError(
                f"data.size: {data.spatial_dims} numbers are needed for data.spatial_dims {data.spatial_dims}"
            )
        if data.window_hu[0] >= data.window_hu[1]:
            raise ValueError("data.window_hu: the first number must be below the second")
        if self.network.kind not in SERVES[self.task]:
            raise ValueError(f"network.kind: {self.network.kind} does not serve task {self.task}")
        if self.task == "segment" and data.pairs:
            raise ValueError("data.pairs: pairs are generated; it needs task generate")
        if self.task == "segment" and self.diffusion.variance == "learned":
            raise ValueError("diffusion.variance: learned needs task generate")
        if self.task == "generate" and self.segment.limit != "none" and (data.modality != "ct" or data.pairs):
            raise ValueError("segment.limit: the range of these images is not known; set it to none")
        if self.diffusion.zero_terminal and self.diffusion.prediction == "noise" and self.network.kind in PREDICTING:
            raise ValueError(
                "diffusion.prediction: the noise says nothing where there is nothing else; predict x0 or velocity, "
                "or set diffusion.zero_terminal to false"
            )
        if self.network.kind == "conditional" and not self.diffusion.zero_terminal:
            raise ValueError("diffusion.zero_terminal: conditional draws from pure noise, and needs true")
        return self


def plain(config: Config) -> dict[str, Any]:
    """The configuration as values that YAML and JSON can hold."""
    return config.model_dump(mode="json")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted names: {"train": {"lr": 1}} -> {"train.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
