"""Validation of a run: the model file just written, judged by the code that users run, and pictures of what it does."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medseg_diff.calibrated import Calibrated
from medseg_diff.checkpoint import Model, load_model
from medseg_diff.config import MASK_DENOISERS, SAMPLING
from medseg_diff.datasets.cache import Volume
from medseg_diff.datasets.layouts import Case
from medseg_diff.diffusion.masks import from_analog, one_hot
from medseg_diff.evaluate import evaluate_model, logged
from medseg_diff.figures import colours, draw_grid, draw_strip
from medseg_diff.generate import generate_images
from medseg_diff.inference import predict, trace
from medseg_diff.uncertainty.fitting import Fitting

STRIP_STEPS = 4
"""Calls of the denoiser that the strip of the process shows."""


def validate(
    path: Path, device: torch.device, cases: Sequence[Case], held_out: Sequence[Volume], seed: int
) -> tuple[dict[str, float], Calibrated | None]:
    """Metrics of a model file on validation cases, and what they calibrate; neither for task generate.

    Leaves pictures beside the file.
    """
    model = load_model(path, device)
    config = model.about.config
    if config.task == "generate":
        images = generate_images(model, config.segment.samples, steps=config.segment.steps, seed=seed)
        masks = images[:, len(model.about.channels) :].argmax(1) if config.data.pairs else None
        draw_grid(images[:, 0], path.with_name("grid.png"), masks)
        return {}, None
    drawing, settings, fitting = config.network.kind in SAMPLING, config.segment, Fitting()
    model = at_own_temperature(model, held_out, fitting)
    if drawing:
        draw_process(model, held_out[0], path.with_name("process.png"), seed)
    summary = evaluate_model(model, cases, seed=seed, preview=path.with_name("preview.png"), fitting=fitting)
    assert config.data.spacing_mm is not None
    voxel_ml = float(np.prod(config.data.spacing_mm)) / 1000
    return logged(summary), fitting.fit(settings.samples if drawing else 0, settings.steps, voxel_ml)


def at_own_temperature(model: Model, held_out: Sequence[Volume], fitting: Fitting) -> Model:
    """The model at the temperature that these volumes ask for, where it has a mean head; its draws follow it.

    `fitting` remembers it; the intervals are calibrated after.
    """
    config = model.about.config
    if config.network.kind in MASK_DENOISERS:
        return model
    for volume in held_out:
        found = predict(model, volume.image, samples=0, steps=1, seed=0)
        fitting.add_mean(found.probabilities, volume.labels.numpy())
    return replace(model, about=replace(model.about, calibration=fitting.fit(0, config.segment.steps, 0.0)))


def draw_process(model: Model, volume: Volume, path: Path, seed: int) -> None:
    """The slice with most foreground: above the noisy mask at every call, below the mask drawn from it.

    The network sees a crop around that foreground, as large as in training: a whole CT in one window would take all
    the memory.
    """
    data, classes = model.about.config.data, len(model.about.labels)
    assert data.spacing_mm is not None
    planes = (volume.labels[0] > 0).movedim(data.axis, 0)
    most = int(planes.sum((1, 2)).argmax())
    positions = (planes[most] if planes.any() else ~planes[most]).nonzero()
    centre = np.insert(positions.double().mean(0).round().int(), data.axis, most)
    size = np.array(data.size) if data.spatial_dims == 3 else np.insert(data.size, data.axis, 2 * data.neighbours + 1)
    start = np.clip(centre - size // 2, 0, np.maximum(0, volume.image.shape[1:] - size))
    box = (slice(None), *map(slice, start, start + size))
    image, labels = volume.image[box], volume.labels[box]

    def slice_of(x: Tensor) -> np.ndarray:
        """The slice of a map, shown upright."""
        return x.select(data.axis - 3, most - int(start[data.axis])).rot90(dims=(-2, -1)).numpy()

    above = [("scan", slice_of(image[0]))]
    below = [("reference", colours(slice_of(one_hot(labels[:1], classes)[0])))]
    steps = max(STRIP_STEPS, model.about.config.segment.steps)
    calls = trace(model, image, steps=steps, seed=seed)
    for call in np.linspace(1, len(calls), STRIP_STEPS).round().astype(int).tolist():
        state, probability = calls[call - 1]
        noisy = from_analog(state[None], model.about.config.diffusion.scale)[0]
        above.append(("noise" if call == 1 else f"less noise ({call})", colours(slice_of(noisy))))
        below.append((f"mask drawn from it ({call})", colours(slice_of(probability))))
    width_mm, height_mm = np.delete(data.spacing_mm, data.axis)
    draw_strip([above, below], height_mm / width_mm, path)
