"""A network over a whole scan: window by window, slice by slice, the same noise everywhere for the same sample."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from medseg_diff.checkpoint import Model
from medseg_diff.datasets.pipeline import outside
from medseg_diff.datasets.slices import cut, with_neighbours
from medseg_diff.device import autocast
from medseg_diff.diffusion.masks import pool, to_analog
from medseg_diff.diffusion.process import input_scale_wiener
from medseg_diff.diffusion.sampler import sample
from medseg_diff.diffusion.schedule import levels
from medseg_diff.ensemble import Tally
from medseg_diff.networks.blocks import nearest
from medseg_diff.networks.conditional import STRIDE, Features
from medseg_diff.windows import Window, importance, pad_to_stride, windows

VOXELS_AT_ONCE = 2_000_000
"""Voxels times samples (or slices) in one call; bounds the memory."""

NOISE_KEPT = 2**27
"""Numbers of the noise that are kept for the windows to come, 512 MB; what goes beyond is drawn again for each."""


@dataclass(frozen=True)
class Prediction:
    """On the network's grid: probabilities, counts of the samples, and the samples if they were kept."""

    probabilities: Float[Tensor, "classes x y z"]
    tally: Tally | None
    samples: UInt8[np.ndarray, "samples x y z"] | None


@torch.inference_mode()
def predict(
    model: Model,
    image: Float[Tensor, "channels x y z"],
    *,
    samples: int,
    steps: int,
    seed: int,
    keep: np.ndarray | None = None,
    progress: Callable[[float], object] = lambda share: None,
) -> Prediction:
    """Mean probabilities and `samples` masks of a prepared scan; masks are written into `keep` where it is given.

    `progress` is told of every part that is done, and its share of the whole; the shares add up to 1.
    """
    data, classes = model.about.config.data, len(model.about.labels)
    drawing = model.about.config.network.kind == "conditional"
    image = image.to(model.device)
    axis = data.axis if data.spatial_dims == 2 else None
    stack = image if axis is None else image.movedim(axis + 1, 1)
    space = tuple(stack.shape[1:]) if axis is None else tuple(stack.shape[2:])
    padded = pad_to_stride(space, model.about.config.network.widths)
    probabilities = torch.zeros(classes, *stack.shape[1:])
    weights = torch.zeros(space)
    tally = Tally.empty(samples, classes) if drawing else None
    kept = keep if keep is None or axis is None else np.moveaxis(keep, axis + 1, 1)
    noise = Noise(seed, classes, tuple(n // STRIDE for n in padded))
    found = windows(space, padded, data.size)
    weight = importance(found[0].size) if len(found) > 1 else torch.ones(padded)

    for window in found:
        inside = tuple(slice(a, min(a + s, n)) for a, s, n in zip(window.start, window.size, space, strict=True))
        within = tuple(slice(0, s.stop - s.start) for s in inside)
        weights[inside] += weight[within]
        part = cut(stack, window.start, window.size, outside(data.modality))
        slabs = [slice(None)] if axis is None else _slabs(stack.shape[1], window.size)
        for chosen in slabs:
            batch = part[None] if axis is None else with_neighbours(part, data.neighbours, chosen)
            with autocast(model.device, model.about.config.train.precision):
                features = model.network.encode(batch)
            mean = features.mean_logits.softmax(1).cpu()[_last(within)] * weight[within]
            where = inside if axis is None else (chosen, *inside)
            probabilities[(slice(None), *where)] += mean[0] if axis is None else mean.movedim(1, 0)
            if tally is not None:
                core = tuple(slice(c.start - a, c.stop - a) for c, a in zip(window.core, window.start, strict=True))
                target = window.core if axis is None else (chosen, *window.core)
                drawn = torch.cat(
                    [
                        _draw(model, features, noise, group, window, steps)[_last(core)]
                        for group in _groups(samples, features.mean_logits)
                    ]
                )
                drawn = drawn[:, 0] if axis is None else drawn
                tally.add(drawn)
                if kept is not None:
                    kept[(slice(None), *target)] = drawn.cpu().numpy()
            progress(1 / len(found) / len(slabs))

    probabilities /= weights
    return Prediction(probabilities if axis is None else probabilities.movedim(1, axis + 1), tally, keep)


class Noise:
    """Standard normal maps on a volume's coarse grid, one a (sample, call): slices and windows share them."""

    def __init__(self, seed: int, classes: int, coarse: tuple[int, ...]) -> None:
        self.seed, self.classes, self.coarse = seed, classes, coarse
        self.kept: dict[tuple[int, int], Tensor] = {}

    def __call__(self, sample_index: int, call: int, window: Window) -> Float[Tensor, "classes *coarse"]:
        """The window's part. Drawn on the CPU, so that every device sees the same."""
        whole = self.kept.get((sample_index, call))
        if whole is None:
            generator = torch.Generator().manual_seed(_mix(self.seed, sample_index, call))
            whole = torch.randn(self.classes, *self.coarse, generator=generator)
            if (len(self.kept) + 1) * whole.numel() <= NOISE_KEPT:
                self.kept[sample_index, call] = whole
        inside = zip(window.start, window.size, strict=True)
        return whole[(slice(None), *(slice(a // STRIDE, (a + s) // STRIDE) for a, s in inside))]


@torch.inference_mode()
def trace(
    model: Model, image: Float[Tensor, "channels x y z"], *, steps: int, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """One sample of a whole prepared scan, in one window, call by call: the noisy mask and the mask drawn from it.

    Both are [classes, x, y, z]: the noisy one, an analog mask, repeated from its coarse grid; the other, probabilities.
    """
    data, classes = model.about.config.data, len(model.about.labels)
    axis = data.axis if data.spatial_dims == 2 else None
    stack = image.to(model.device) if axis is None else image.to(model.device).movedim(axis + 1, 1)
    space = stack.shape[1:] if axis is None else stack.shape[2:]
    size = pad_to_stride(space, model.about.config.network.widths)
    window = Window((0,) * len(size), size, tuple(slice(0, n) for n in size))
    batch = stack[None] if axis is None else with_neighbours(stack, data.neighbours)
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(x_t: Tensor, logits: Tensor) -> None:
        both = nearest(x_t[0], STRIDE), logits[0].softmax(1)
        noisy, drawn = (cut(x.cpu(), (0,) * len(space), space) for x in both)
        seen.append((noisy[0], drawn[0]) if axis is None else (noisy.movedim(0, axis + 1), drawn.movedim(0, axis + 1)))

    with autocast(model.device, model.about.config.train.precision):
        features = model.network.encode(cut(batch, window.start, size, outside(data.modality)))
    noise = Noise(seed, classes, tuple(n // STRIDE for n in size))
    _draw(model, features, noise, range(1), window, steps, watch)
    return seen


def _last(box: tuple[slice, ...]) -> Any:
    """An index of the last dimensions."""
    return (..., *box)


def _slabs(count: int, size: tuple[int, ...]) -> list[slice]:
    batch = max(1, VOXELS_AT_ONCE // int(np.prod(size)))
    return [slice(a, min(a + batch, count)) for a in range(0, count, batch)]


def _groups(samples: int, logits: Tensor) -> Iterator[range]:
    together = max(1, VOXELS_AT_ONCE // logits[:, 0].numel())
    return (range(a, min(a + together, samples)) for a in range(0, samples, together))


def _draw(
    model: Model,
    features: Features,
    noise: Noise,
    group: range,
    window: Window,
    steps: int,
    watch: Callable[[Tensor, Tensor], None] = lambda x_t, logits: None,
) -> UInt8[Tensor, "draws batch *space"]:
    """Label indices of the samples in `group`, every slice of the batch with its volume's noise."""
    diffusion = model.about.config.diffusion
    batch = len(features.mean_logits)

    def maps(call: int) -> Tensor:
        drawn = torch.stack([noise(index, call, window) for index in group]).to(model.device)
        return drawn[:, None].expand(-1, batch, *drawn.shape[1:])

    logits = torch.empty(0)
    call = 0

    def denoise(x_t: Tensor, alpha_bar: Tensor) -> Tensor:
        nonlocal logits, call
        z = x_t if alpha_bar == 0 else maps(2 * call)
        call += 1
        level = alpha_bar.to(x_t).expand(batch)
        with autocast(model.device, model.about.config.train.precision):
            logits = model.network.denoiser(features, input_scale_wiener(level[0], diffusion.scale) * x_t, level, z)
        watch(x_t, logits)
        coarse = pool(logits.softmax(2).flatten(0, 1), STRIDE)
        return to_analog(coarse, diffusion.scale).unflatten(0, (-1, batch))

    x_T = maps(0)

    def fresh(step: int) -> Tensor:
        """The last step adds no noise: whatever stands there is multiplied by 0, and x_T costs nothing."""
        return maps(2 * step + 1) if step < steps - 1 else x_T

    sample(denoise, x_T, levels(diffusion.schedule, steps), method="ddpm", noise=fresh)
    return logits.argmax(2).to(torch.uint8)


def _mix(*numbers: int) -> int:
    """A seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
