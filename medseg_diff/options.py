"""Options that several commands share, and what they may be."""

from enum import StrEnum
from typing import Annotated

import typer


class Split(StrEnum):
    """Which cases to evaluate."""

    val = "val"
    train = "train"
    all = "all"


class Modality(StrEnum):
    """What a phantom looks like."""

    ct = "ct"
    mr = "mr"


Sampler = StrEnum("Sampler", {"ddpm": "ddpm", "ddim": "ddim", "dpm": "dpm++", "dpm_sde": "dpm++sde", "heun": "heun"})
"""How noise becomes a mask or an image."""


class Fuse(StrEnum):
    """How samples become one mask."""

    mean = "mean"
    vote = "vote"
    staple = "staple"


ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A .safetensors file, a run folder or a shipped model (hippocampus); else $MEDSEG_DIFF_MODEL, "
        "else the newest run.",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, max=2**31 - 1, help="The same seed gives the same bytes.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu or cuda; by default cuda where there is one.")]
SamplerOption = Annotated[
    Sampler | None, typer.Option("--sampler", help="How noise becomes a mask or an image; by default the model's.")
]
FuseOption = Annotated[
    Fuse | None, typer.Option("--fuse", help="How MedSegDiff and the classic U-Net report their samples.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SamplesOption = Annotated[int | None, typer.Option("--samples", min=2, max=1024, help="Masks to draw.")]
StepsOption = Annotated[int | None, typer.Option("--steps", min=1, max=1000, help="Steps of the sampler.")]
