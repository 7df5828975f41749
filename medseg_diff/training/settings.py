"""The configuration of a run: filled in, written down once, held against what comes later."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from medseg_diff.config import Config, Tracking, flatten, plain
from medseg_diff.config_file import load_config
from medseg_diff.console import progress
from medseg_diff.datasets.layouts import Case
from medseg_diff.datasets.reading import read_case
from medseg_diff.errors import UserError
from medseg_diff.files import replacing
from medseg_diff.scans.geometry import ras_spacing

MAY_CHANGE = (
    "train.steps", "train.max_minutes", "train.patience", "train.checkpoint_every",
    "tracking.uri", "tracking.experiment", "data.cache",
)  # fmt: skip
"""Keys that may differ between two calls of the same run."""


def resolve(config: Config, training: Sequence[Case], channels: int) -> Config:
    """The configuration with the spacing filled in: the median over the training cases."""
    if config.data.spacing_mm is not None:
        return config
    found = []
    with progress("reading spacings", len(training)) as advance:
        for case in training:
            found.append(ras_spacing(read_case(case, channels).affine))
            advance()
    right, anterior, superior = (round(float(length), 4) for length in np.median(found, axis=0))
    return _with_spacing(config, (right, anterior, superior))


def settle(folder: Path, config: Config, training: Sequence[Case], channels: int) -> Config:
    """The resolved configuration, found in the run or written there; a run goes on only as it began."""
    path = folder / "config.yaml"
    began = same_run(path, config)
    if began is not None:
        return began
    config = resolve(config, training, channels)
    with replacing(path) as temporary:
        temporary.write_text(yaml.safe_dump(plain(config), sort_keys=False))
    return config


def same_run(path: Path, config: Config) -> Config | None:
    """The configuration with the spacing that the run at `path` found, None where there is no run. Raises UserError."""
    if not path.exists():
        return None
    began = load_config(path)
    if config.data.spacing_mm is None:
        config = _with_spacing(config, began.data.spacing_mm)
    old, new = flatten(plain(began)), flatten(plain(config))
    changed = [f"{key}: {old[key]} -> {new[key]}" for key in old if old[key] != new[key] and key not in MAY_CHANGE]
    if changed:
        what = f"the run began with another configuration ({'; '.join(changed)})"
        raise UserError(path.parent, what, "Train under another --name, or start again with --fresh.")
    return config


def without_paths(config: Config) -> Config:
    """What goes with a model and to MLflow: names of folders and not where they lie, and no address of a store."""
    folders = {name: Path(getattr(config.data, name).name) for name in ("root", "cache")}
    tracking = Tracking(experiment=config.tracking.experiment)
    return config.model_copy(update={"data": config.data.model_copy(update=folders), "tracking": tracking})


def _with_spacing(config: Config, spacing_mm: tuple[float, float, float] | None) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update={"spacing_mm": spacing_mm})})
