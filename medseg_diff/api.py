"""The program from Python: `medseg_diff.load(model).segment(scan)`, in memory, by the code of the command."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Integer

from medseg_diff.checkpoint import Model, find_model, load_model
from medseg_diff.denoising import resampled
from medseg_diff.device import choose_device
from medseg_diff.ensemble import LabelReport
from medseg_diff.errors import UserError
from medseg_diff.scans.memory import scan_of, to_nibabel
from medseg_diff.scans.read import Scan
from medseg_diff.segmentation import Segmentation, drawn, probability_frames, sample_frames, segment_scan


@dataclass(frozen=True)
class Result:
    """What is known about a scan, on its own grid.

    Attributes:
        scan: as it was read, with its warnings.
        names: label value -> name, ascending; 0 is the background.
        labels: of each label but the background: volume with its interval, agreement of the samples, expected Dice.

    """

    scan: Scan
    names: dict[int, str]
    labels: tuple[LabelReport, ...]
    _found: Segmentation

    @property
    def mask(self) -> Integer[np.ndarray, "x y z"]:
        """The data set's own label values."""
        return self._found.label_map

    @property
    def uncertainty(self) -> Float[np.ndarray, "x y z"]:
        """The probability that the label is wrong."""
        return self._found.uncertainty

    @property
    def probabilities(self) -> Float[np.ndarray, "classes x y z"]:
        """Of each label in `names`; brought onto the grid at each call."""
        return np.stack([*probability_frames(self._found.prediction, self._found.affine, self.scan)])

    @property
    def samples(self) -> Integer[np.ndarray, "samples x y z"] | None:
        """The sampled masks; None of a deterministic model. Brought onto the grid at each call."""
        if self._found.prediction.samples is None:
            return None
        return np.stack([*sample_frames(self._found, list(self.names), self.scan)])

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences about what had to be assumed or mended in the scan."""
        return self.scan.warnings

    def to_nibabel(self, what: Literal["mask", "uncertainty", "probabilities", "samples"] = "mask") -> Any:
        """A nibabel image in mm; classes and samples are its frames."""
        array = getattr(self, what)
        if array is None:
            raise ValueError("a deterministic model draws no samples: ask for mask, uncertainty or probabilities")
        return to_nibabel(array, self.scan.affine)


@dataclass(frozen=True)
class Segmenter:
    """A model that segments scans; `model.about` says what it is."""

    model: Model

    def segment(self, scan: Any, *, samples: int | None = None, steps: int | None = None, seed: int = 0) -> Result:
        """Segments a path, a nibabel or SimpleITK image, or (array, affine): RAS, in mm, x y z or channels x y z.

        The same seed gives what the command writes. Raises UserError for a scan that can't be trusted.
        """
        read, (samples, steps) = scan_of(scan, len(self.model.about.channels)), drawn(self.model, samples, steps)
        with tempfile.TemporaryDirectory() as folder:  # what is mapped stays, as long as it is used
            keep = Path(folder) if samples else None
            found = segment_scan(self.model, read, samples=samples, steps=steps, seed=seed, keep=keep)
        return Result(read, self.model.about.labels, found.labels, found)


def load(
    model: str | Path | None = None,
    *,
    device: str | None = None,
    sampler: str | None = None,
    fuse: str | None = None,
) -> Segmenter:
    """A model by its file, its run folder or its shipped name, else the one that the command would take.

    `device`, `sampler` and `fuse` are those of the command. Raises UserError.
    """
    path, _ = find_model(None if model is None else str(model), "segment")
    return Segmenter(open_model(path, "segment", device, sampler=sampler, fuse=fuse))


def open_model(path: Path, task: str, device: str | None, **sampling: str | None) -> Model:
    """The model in a file, to be sampled in another way than it was saved with. Raises UserError for another task."""
    model = load_model(path, choose_device(device))
    if model.about.config.task != task:
        what = f"is a model of task {model.about.config.task}, not {task}"
        raise UserError(path, what, f"Name a model of task {task}.")
    return resampled(model, **sampling)
