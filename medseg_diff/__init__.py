"""Diffusion made practical for medical image segmentation: many plausible masks, one honest answer."""

import os

# Before MONAI imports MLflow: telemetry and chatter are off unless the user turns them on.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")

__version__ = "0.1.0"
