"""Diffusion made practical for medical image segmentation: many plausible masks, one honest answer."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medseg_diff.api import load as load

# Before torch is imported: threads that wait for each other soon sleep; spinning on, they halve their own speed as soon
# as another process is busy.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
# Before MONAI imports MLflow: telemetry and chatter are off unless the user turns them on.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`load` of medseg_diff.api, imported when it is asked for: torch and MONAI take seconds."""
    if name == "load":
        return import_module("medseg_diff.api").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
