"""Images from noise: `medseg-diff generate`. The process, the schedules and the samplers are those of the masks."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from medseg_diff.checkpoint import Model
from medseg_diff.console import progress
from medseg_diff.device import autocast
from medseg_diff.diffusion.process import x0_from_velocity
from medseg_diff.diffusion.sampler import sample
from medseg_diff.diffusion.schedule import levels
from medseg_diff.figures import draw_grid
from medseg_diff.scans.write import write_volume

TOGETHER = 16
"""Images in one call of the network."""


@torch.inference_mode()
def generate_images(model: Model, count: int, *, steps: int, seed: int) -> Float[Tensor, "count channels *size"]:
    """Images with the intensities of training (normalized), by DPM-Solver++ from noise seeded by (seed, image)."""
    config = model.about.config
    shape = (len(model.about.channels), *config.data.size)
    path = levels(config.diffusion.schedule, steps)

    def denoise(x_t: Tensor, alpha_bar: Tensor) -> Tensor:
        level = alpha_bar.expand(len(x_t))
        with autocast(model.device, config.train.precision):
            velocity = model.network(x_t, level)
        return x0_from_velocity(x_t, velocity, level)

    images = []
    with progress("generating", count) as advance:
        for start in range(0, count, TOGETHER):
            chosen = range(start, min(start + TOGETHER, count))
            noise = torch.stack([_noise(shape, seed, index) for index in chosen]).to(model.device)
            images.append(sample(denoise, noise, path, method="dpm++").cpu())
            advance(len(chosen))
    return torch.cat(images)


def generate_files(model: Model, out: Path, count: int, *, steps: int | None, seed: int) -> list[Path]:
    """Writes `grid.png` and one `image_NNNN.nii.gz` an image; returns the paths."""
    config = model.about.config
    images = generate_images(model, count, steps=steps or config.segment.steps, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "grid.png"]
    draw_grid(images[:64, 0], paths[0])
    spacing = config.data.spacing_mm
    assert spacing is not None
    affine = np.diag([*spacing, 1.0])
    for index, image in enumerate(images):
        array = image.numpy()
        if config.data.spatial_dims == 2:
            array = np.expand_dims(array, config.data.axis + 1)
        path = out / f"image_{index:04d}.nii.gz"
        write_volume(array, affine, path)
        paths.append(path)
    return paths


def _noise(shape: tuple[int, ...], seed: int, index: int) -> Tensor:
    """Drawn on the CPU, so that every device starts from the same."""
    state = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0] >> np.uint64(1)
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(state)))
