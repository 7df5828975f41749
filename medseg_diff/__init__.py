"""Diffusion made practical for medical image segmentation: many plausible masks, one honest answer."""

import os

# Before torch is imported: threads that wait for each other soon sleep; spinning on, they halve their own speed as soon
# as another process is busy.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
# Before MONAI imports MLflow: telemetry and chatter are off unless the user turns them on.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")

__version__ = "0.1.0"
