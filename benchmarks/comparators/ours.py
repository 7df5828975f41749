"""The networks of the package, trained by its own steps: conditional, unet, MedSegDiff V1 and V2."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from comparators.protocol import CPU, Prediction, timed, within
from medseg_diff.checkpoint import Model, build
from medseg_diff.config import SAMPLING, Config
from medseg_diff.datasets.cache import Volume
from medseg_diff.inference import predict as predict_scan
from medseg_diff.training.state import MEAN_HEAD, begin
from medseg_diff.training.step import take_step

__all__ = ["build", "predict", "train"]


def train(volumes: Sequence[Volume], config: Config, classes: int, cpu_seconds: float) -> tuple[nn.Module, int]:
    """The moving average of the weights after so much CPU time, and the steps."""
    config = timed(config, cpu_seconds)
    state = begin(config, len(volumes[0].image), classes, CPU, volumes)

    def step(count: int, spent: float) -> None:
        state.step, state.elapsed_s = count, spent * cpu_seconds
        if config.network.kind == "conditional" and spent >= MEAN_HEAD and not state.denoising:
            state.teach_denoiser()
        take_step(state, config, volumes, classes)

    steps = within(cpu_seconds, config, state.optimizer, step)
    return state.average, steps


def predict(model: Model, volume: Volume, samples: int, seed: int) -> Prediction:
    config = model.about.config
    drawing = config.network.kind in SAMPLING
    keep = np.empty((samples, *volume.image.shape[1:]), np.uint8) if drawing else None
    with torch.inference_mode():
        found = predict_scan(
            model, volume.image, samples=samples if drawing else 0, steps=config.segment.steps, seed=seed, keep=keep
        )
    return found.probabilities.numpy(), keep
