"""Validation of a run: the model file just written, judged by the code that users run, and pictures of what it does."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from medseg_diff.checkpoint import Model, load_model
from medseg_diff.datasets.cache import Volume
from medseg_diff.datasets.layouts import Case
from medseg_diff.diffusion.masks import from_analog
from medseg_diff.evaluate import evaluate_model, logged
from medseg_diff.figures import colours, draw_grid, draw_strip
from medseg_diff.generate import generate_images
from medseg_diff.inference import trace

STRIP_STEPS = 4
"""Calls of the denoiser that the strip of the process shows."""


def validate(
    path: Path, device: torch.device, cases: Sequence[Case], held_out: Sequence[Volume], seed: int
) -> dict[str, float]:
    """Metrics of a model file on validation cases, none for task generate; leaves pictures beside the file."""
    model = load_model(path, device)
    config = model.about.config
    if config.task == "generate":
        images = generate_images(model, config.segment.samples, steps=config.segment.steps, seed=seed)
        draw_grid(images[:, 0], path.with_name("grid.png"))
        return {}
    if config.network.kind == "conditional":
        draw_process(model, held_out[0], path.with_name("process.png"), seed)
    return logged(evaluate_model(model, cases, seed=seed, preview=path.with_name("preview.png")))


def draw_process(model: Model, volume: Volume, path: Path, seed: int) -> None:
    """The slice with most foreground: above the noisy mask at every call, below the mask drawn from it."""
    config = model.about.config
    axis, spacing_mm = config.data.axis, config.data.spacing_mm
    assert spacing_mm is not None
    reference = volume.labels[0].numpy()
    length = reference.shape[axis]
    index = int((reference > 0).sum(tuple(i for i in range(3) if i != axis)).argmax())

    def slice_of(x: np.ndarray) -> np.ndarray:
        """The same slice of a map on any grid over the volume, shown upright."""
        return np.rot90(np.take(x, index * x.shape[axis - 3] // length, axis - 3), axes=(-2, -1))

    classes = np.stack([reference == k for k in range(len(model.about.labels))]).astype(float)
    above = [("scan", slice_of(volume.image[0].numpy()))]
    below = [("reference", colours(slice_of(classes)))]
    for call, (state, probability) in enumerate(trace(model, volume.image, steps=STRIP_STEPS, seed=seed), start=1):
        noisy = from_analog(state[None], config.diffusion.scale)[0].numpy()
        above.append(("noise" if call == 1 else f"less noise ({call})", colours(slice_of(noisy))))
        below.append((f"mask drawn from it ({call})", colours(slice_of(probability.numpy()))))
    across, along = np.delete(spacing_mm, axis)
    draw_strip([above, below], along / across, path)
