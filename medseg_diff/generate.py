"""Images from noise: `medseg-diff generate`. The process, the schedules and the samplers are those of the masks."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from medseg_diff import __version__
from medseg_diff.checkpoint import Model
from medseg_diff.config import plain
from medseg_diff.console import progress
from medseg_diff.datasets.pipeline import original_intensities
from medseg_diff.denoising import draw, estimate, method_of
from medseg_diff.diffusion.masks import from_analog
from medseg_diff.errors import UserError
from medseg_diff.figures import colours, draw_grid
from medseg_diff.files import replacing
from medseg_diff.film import draw_film, draw_process
from medseg_diff.scans.write import label_dtype, write_volume

TOGETHER = 16
"""Images in one call of the network."""

IN_GRID = 64
"""Images in `grid.png`."""

ABOUT = "generation.json"

Watch = Callable[[Tensor, Tensor, float], object]

SHOWN = 2
"""Images whose way from noise is shown."""


@torch.inference_mode()
def draw_images(
    model: Model, count: int, *, steps: int, seed: int, watch: Watch = lambda x_t, x_0, alpha_bar: None
) -> Iterator[Float[Tensor, "together channels *size"]]:
    """Images with the intensities of training (normalized), from noise seeded by (seed, image), some at a time.

    Where the model makes pairs, the analog masks of its labels are the last channels. watch(x_t, x_0, alpha_bar_t) sees
    the first images at every call, and what they became.
    """
    config = model.about.config
    masks = len(model.about.labels) if config.data.pairs else 0
    shape = (len(model.about.channels) + masks, *config.data.size)
    first = True

    def denoise(x_t: Tensor, alpha_bar: Tensor) -> Any:
        found = estimate(model, model.network, x_t, alpha_bar)
        if first:
            watch(x_t, found[0] if isinstance(found, tuple) else found, float(alpha_bar))
        return found

    with progress("generating", count) as advance:
        for start in range(0, count, TOGETHER):
            chosen = range(start, min(start + TOGETHER, count))

            def noise(call: int, chosen: Sequence[int] = chosen) -> Tensor:
                return torch.stack([_noise(shape, seed, index, call) for index in chosen]).to(model.device)

            x_0 = draw(config, denoise, noise(0), steps, lambda step: noise(step + 1))
            if not torch.isfinite(x_0).all():
                raise UserError(model.path, "its images are not finite", "Train it again, at a lower train.lr.")
            if first:
                watch(x_0, x_0, 1.0)
            first = False
            yield x_0.cpu()
            advance(len(chosen))


def generate_images(model: Model, count: int, *, steps: int, seed: int) -> Float[Tensor, "count channels *size"]:
    """All of `draw_images`."""
    return torch.cat(list(draw_images(model, count, steps=steps, seed=seed)))


def generate_files(
    model: Model, out: Path, count: int, *, steps: int | None, seed: int, show_process: bool = False
) -> list[Path]:
    """Writes one `image_NNNN.nii.gz` an image as they come, then `grid.png` and `generation.json`; returns the paths.

    With pairs `image_NNNN_seg.nii.gz` lies beside each image, and the folder is a data set in the Decathlon layout: the
    same files again in `imagesTr` and `labelsTr` (as links where the disk has them), and a `dataset.json`.
    `show_process` adds `process.png` and `process.gif`. What an earlier call left in the folder is removed.
    """
    config, channels = model.about.config, len(model.about.channels)
    steps = steps or config.segment.steps
    out.mkdir(parents=True, exist_ok=True)
    _remove_earlier(out)
    states: list[tuple[str, dict[str, np.ndarray]]] = []

    def watch(x_t: Tensor, x_0: Tensor, alpha_bar: float) -> None:
        if show_process:
            states.append((rf"$\bar\alpha$ = {alpha_bar:.3f}", _pictures(model, x_t, x_0)))

    _write_json(out / ABOUT, _account(model, count, steps, seed))
    paths, per_image = [out / ABOUT], 2 if config.data.pairs else 1
    shown: list[Tensor] = []
    for drawn in draw_images(model, count, steps=steps, seed=seed, watch=watch):
        shown += list(drawn[: max(0, IN_GRID - len(shown))])
        for pair in drawn:
            paths += _write_pair(model, pair, out, f"image_{(len(paths) - 1) // per_image:04d}")
    grid = torch.stack(shown)
    draw_grid(grid[:, 0], out / "grid.png", grid[:, channels:].argmax(1) if config.data.pairs else None)
    paths.insert(0, out / "grid.png")
    if show_process:
        paths += _draw_states(model, states, out)
    if config.data.pairs:
        paths += _as_dataset(model, out, count)
    return paths


def _write_pair(model: Model, drawn: Float[Tensor, "channels *size"], out: Path, name: str) -> list[Path]:
    """The image, and the mask where the model makes pairs."""
    channels, values = len(model.about.channels), np.array(list(model.about.labels))
    paths = [out / f"{name}.nii.gz"]
    _write(model, original_intensities(drawn[:channels], model.about.config.data).numpy(), paths[0])
    if model.about.config.data.pairs:
        paths.append(out / f"{name}_seg.nii.gz")
        labels = values[drawn[channels:].argmax(0).numpy()]
        _write(model, labels[None].astype(label_dtype(values.tolist())), paths[1])
    return paths


def _remove_earlier(out: Path) -> None:
    """Files of this program alone, and only where it says that it wrote some: two models must not mix."""
    if not (out / ABOUT).exists():
        return
    for pattern in (
        "image_*.nii.gz",
        "imagesTr/image_*.nii.gz",
        "labelsTr/image_*.nii.gz",
        "process.*",
        "dataset.json",
    ):
        for path in out.glob(pattern):
            path.unlink()


def _pictures(model: Model, x_t: Tensor, x_0: Tensor) -> dict[str, np.ndarray]:
    """A noisy state and what is estimated from it, of the first images, upright; of volumes the middle slice."""
    channels, found = len(model.about.channels), {}
    for name, x in (("$x_t$", x_t[:SHOWN].cpu()), (r"$\hat x_0$", x_0[:SHOWN].cpu())):
        flat = (x if x.ndim == 4 else x[..., x.shape[-1] // 2]).rot90(dims=(-2, -1))
        found[name] = flat[:, 0].numpy()
        if flat.shape[1] > channels:
            masks = from_analog(flat[:, channels:], model.about.config.diffusion.scale).numpy()
            found[f"{name}, mask"] = np.stack([colours(mask) for mask in masks])
    return found


def _draw_states(model: Model, states: Sequence[tuple[str, dict[str, np.ndarray]]], out: Path) -> list[Path]:
    data = model.about.config.data
    assert data.spacing_mm is not None
    width_mm, height_mm = (np.delete(data.spacing_mm, data.axis) if data.spatial_dims == 2 else data.spacing_mm)[:2]
    last = next(iter(states[-1][1].values()))
    limits = float(np.percentile(last, 0.5)), float(np.percentile(last, 99.5))
    paths = [out / "process.png", out / "process.gif"]
    draw_process(states, paths[0], limits=limits, aspect=float(height_mm / width_mm))
    draw_film(states, paths[1], limits=limits, aspect=float(height_mm / width_mm))
    return paths


def _write(model: Model, array: np.ndarray, path: Path) -> None:
    """On the network's grid; a slice is one voxel thick."""
    data = model.about.config.data
    assert data.spacing_mm is not None
    if data.spatial_dims == 2:
        array = np.expand_dims(array, data.axis + 1)
    write_volume(array, np.diag([*data.spacing_mm, 1.0]), path)


def _as_dataset(model: Model, out: Path, count: int) -> list[Path]:
    """The layout of the Medical Segmentation Decathlon around files that are there."""
    names = [f"image_{index:04d}" for index in range(count)]
    for folder, suffix in (("imagesTr", ""), ("labelsTr", "_seg")):
        (out / folder).mkdir(exist_ok=True)
        for name in names:
            _link(out / f"{name}{suffix}.nii.gz", out / folder / f"{name}.nii.gz")
    description = {
        "name": out.resolve().name,
        "description": "Synthetic pairs of images and labels, drawn by medseg-diff generate",
        "modality": {str(index): channel for index, channel in enumerate(model.about.channels)},
        "labels": {str(value): name for value, name in model.about.labels.items()},
        "numTraining": count,
        "numTest": 0,
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names],
        "test": [],
    }
    _write_json(out / "dataset.json", description)
    return [out / "dataset.json"]


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # no links on this disk
        shutil.copyfile(source, target)


def _account(model: Model, count: int, steps: int, seed: int) -> dict[str, Any]:
    """What was drawn and how; `medseg-diff evaluate --generated` prepares the reference by it."""
    config = model.about.config
    return {
        "model": {"path": str(model.path), "digest": model.digest, "version": model.about.version},
        "program": __version__,
        "dataset": model.about.dataset,
        "count": count,
        "seed": seed,
        "steps": steps,
        "sampler": method_of(config),
        "config": plain(config),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def _noise(shape: tuple[int, ...], seed: int, index: int, call: int) -> Tensor:
    """Drawn on the CPU, so that every device starts from the same."""
    state = np.random.SeedSequence((seed, index, call)).generate_state(1, np.uint64)[0] >> np.uint64(1)
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(state)))
