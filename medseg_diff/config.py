"""The configuration: the only home of defaults. A field's docstring is its documentation."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Snomed = Annotated[str, Field(pattern=r"^\d{6,18} \|[^|~^\\]{1,64}\|$")]
Count = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Data(_Section):
    """Which cases, and how a scan becomes the grid that the network sees."""

    root: Path
    """Folder of a data set, or its CSV table; data/README.md has the layouts."""
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
    codes: dict[Annotated[int, Field(ge=1)], tuple[Snomed, Snomed]] = {}
    """Of labels, by value: the SNOMED CT category and type that DICOM segmentations and 3D Slicer name, each as
    "10200004 |Liver|"; others are "85756007 |Tissue|"."""
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
    log_snr_shift: Annotated[float, Field(ge=-20, le=20)] = 0.0
    """Added to the schedule's log-SNR; below 0 there is more noise at every time, as large images need."""
    train_steps: Annotated[int, Field(ge=4)] = 1000
    """Number of noise levels that training draws from."""
    scale: Positive = 0.5
    """b: analog masks live in [-b, b]."""
    pure_noise: Share = 0.5
    """Share of the training levels that are pure noise, where one call draws a sample; 0 for the other denoisers."""
    draws: Annotated[int, Field(ge=2)] = 8
    """Of conditional: masks drawn for one training image, whose volumes are scored against its own."""
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
    """Forward passes whose gradients are gathered for one step. It equals the large batch, but for what is a statistic
    of a pass: soft Dice over the batch, and the running scales of conditional's score of draws."""
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
    condition_every: Count = 5
    """Of medsegdiff_v2: every so many steps Dice and cross-entropy teach the condition model."""
    augment: bool = True
    """Rotate, scale, shift, and change the intensities of what is trained on, but in the last quarter of the budget at
    most; the denoiser of conditional, which is trained last, sees them changed all the time."""
    checkpoint_every: Count = 200
    """Steps between two states to resume from."""
    validations: Count = 4
    """Validations over the budget, evenly spaced, the last one at its end."""
    patience: Count | None = 3
    """Training ends early when so many validations in a row are no better than the best, which is kept: others by Dice,
    conditional by the NLL at its temperature, and its denoiser is trained all the same. null: never. It does nothing
    where validations is not larger by 2. What ends early has not annealed: the learning rate follows the budget."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on CUDA and on processors that are fast in it, fp32 elsewhere."""


class Segment(_Section):
    """Sampling."""

    samples: Annotated[int, Field(ge=2, le=1024)] = 16
    """Masks (or images to preview) drawn by default."""
    steps: Count = 1
    """Steps of the sampler, 32 for other denoisers than conditional; a step calls it once (twice with heun)."""
    sampler: Literal["auto", "ddpm", "ddim", "dpm++", "dpm++sde", "heun"] = "auto"
    """auto: ddpm for conditional, which draws at every call, and where the variance is not small; else dpm++."""
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
    use: str = ""
    """What the model is for, and what not: goes with it, and is said with whatever it segments."""
    data: Data
    network: Network = Network()
    diffusion: Diffusion = Diffusion()
    train: Train = Train()
    segment: Segment = Segment()
    tracking: Tracking = Tracking()

    @model_validator(mode="before")
    @classmethod
    def _steps_by_kind(cls, values: Any) -> Any:
        """A draw takes one step from pure noise; a network that estimates the mean takes many, from any level."""
        if not isinstance(values, dict):
            return values
        sections = {key: values.get(key, {}) for key in ("network", "diffusion", "segment")}
        if not all(isinstance(section, dict) for section in sections.values()):
            return values
        many = sections["network"].get("kind", "conditional") in PREDICTING
        diffusion = {"pure_noise": 0.0 if many else 0.5} | sections["diffusion"]
        return {**values, "diffusion": diffusion, "segment": {"steps": 32 if many else 1} | sections["segment"]}

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        for wrong, message in _misfits(self):
            if wrong:
                raise ValueError(message)
        return self


def _misfits(config: Config) -> Iterator[tuple[bool, str]]:
    """Every rule between keys: whether it is broken, and what to say then."""
    data, diffusion, segment, kind = config.data, config.diffusion, config.segment, config.network.kind
    generate, dims = config.task == "generate", data.spatial_dims
    ends_in_noise = diffusion.zero_terminal or diffusion.schedule == "cosine"
    yield data.fold >= data.folds, f"data.fold: {data.fold} is not below data.folds, {data.folds}"
    yield len(data.size) != dims, f"data.size: {dims} numbers are needed for data.spatial_dims {dims}"
    yield data.window_hu[0] >= data.window_hu[1], "data.window_hu: the first number must be below the second"
    yield kind not in SERVES[config.task], f"network.kind: {kind} does not serve task {config.task}"
    yield data.pairs and not generate, "data.pairs: pairs are generated; it needs task generate"
    yield (
        config.network.padding == "valid" and (generate or kind != "classic_unet"),
        "network.padding: valid is for classic_unet with task segment",
    )
    yield (
        diffusion.variance == "learned" and not generate,
        "diffusion.variance: learned needs task generate",
    )
    yield (
        diffusion.variance == "large" and kind == "conditional",
        "diffusion.variance: conditional draws masks, and the small one is exact",
    )
    yield (
        kind == "conditional" and segment.sampler not in ("auto", "ddpm", "ddim"),
        f"segment.sampler: {segment.sampler} builds on estimates, and conditional draws; choose ddpm or ddim",
    )
    yield (
        diffusion.variance != "small" and segment.sampler not in ("auto", "ddpm"),
        f"diffusion.variance: {diffusion.variance} is for segment.sampler ddpm",
    )
    yield (
        kind == "conditional" and not ends_in_noise,
        "diffusion.zero_terminal: conditional draws from pure noise, and needs true",
    )
    yield (
        diffusion.prediction == "noise" and kind in PREDICTING and ends_in_noise,
        "diffusion.prediction: at pure noise the noise says nothing else; predict x0 or velocity, or take another "
        "schedule than cosine with diffusion.zero_terminal false",
    )
    yield (
        diffusion.weighting == "min_snr" and diffusion.pure_noise > 0 and kind in PREDICTING,
        "diffusion.weighting: min_snr teaches nothing at pure noise; set diffusion.pure_noise to 0",
    )
    yield (
        segment.spacing == "leading" and ends_in_noise,
        "segment.spacing: leading does not begin at the pure noise of this schedule; choose trailing",
    )
    yield (
        segment.limit != "none" and generate and (data.modality != "ct" or data.pairs),
        "segment.limit: the range of these images is not known; set it to none",
    )


def plain(config: Config) -> dict[str, Any]:
    """The configuration as values that YAML and JSON can hold."""
    return config.model_dump(mode="json")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted names: {"train": {"lr": 1}} -> {"train.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
