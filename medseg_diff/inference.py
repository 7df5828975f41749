"""A network over a whole scan: window by window, slice by slice, the same noise everywhere for the same sample."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from medseg_diff.checkpoint import Model
from medseg_diff.config import MASK_DENOISERS
from medseg_diff.datasets.pipeline import outside
from medseg_diff.datasets.slices import cut, with_neighbours
from medseg_diff.denoising import draw, estimate
from medseg_diff.device import autocast
from medseg_diff.diffusion.fields import SPACINGS, cells, smooth
from medseg_diff.diffusion.masks import from_analog, input_scale, one_hot, pool, to_analog, to_labels
from medseg_diff.diffusion.process import input_scale_wiener
from medseg_diff.ensemble import Tally, staple
from medseg_diff.errors import UserError
from medseg_diff.networks.blocks import Condition, nearest
from medseg_diff.networks.conditional import SHARED, STRIDE, Features
from medseg_diff.windows import Window, importance, pad_to_stride, windows

VOXELS_AT_ONCE = 2_000_000
"""Voxels times samples (or slices) in one call; bounds the memory."""

Watch = Callable[[Tensor, Tensor], None]
"""Is shown x_t and the soft mask that is estimated from it, both [draws, batch, classes, *grid]."""

NOISE_KEPT = 2**27
"""Numbers of the noise that are kept for the windows to come, 512 MB; what goes beyond is drawn again for each."""

REPEAT = 64
"""Cells after which the noise of a drawn mask repeats: 256 voxels for the roughest field."""


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

    The probabilities are the mean head's, or, of a network without one, what its samples say together. Where the model
    was calibrated both are at its temperature. A network that draws nothing is asked for 0 samples; others may be.
    `progress` is told of every part that is done, and its share of the whole; the shares add up to 1.
    """
    config, classes = model.about.config, len(model.about.labels)
    data, kind = config.data, config.network.kind
    staple_wanted = kind in MASK_DENOISERS and config.segment.fuse == "staple"
    image = image.to(model.device)
    axis = data.axis if data.spatial_dims == 2 else None
    stack = image if axis is None else image.movedim(axis + 1, 1)
    space = tuple(stack.shape[1:]) if axis is None else tuple(stack.shape[2:])
    padded = pad_to_stride(space, config.network.widths)
    probabilities = torch.zeros(classes, *stack.shape[1:])
    weights = torch.zeros(space)
    tally = Tally.empty(samples, classes) if samples else None
    masks = np.empty((samples, *image.shape[1:]), np.uint8) if staple_wanted and keep is None else keep
    kept = masks if masks is None or axis is None else np.moveaxis(masks, axis + 1, 1)
    noise = Noise(seed, classes, padded, STRIDE if kind == "conditional" else 1)
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
            with autocast(model.device, config.train.precision):
                condition = at_temperature(model.network.encode(batch), model)
            if tally is None:
                fused = condition.mean_logits.softmax(1)
            else:
                drawn, fused = _sampled(model, condition, len(batch), noise, samples, window, steps)
                core = tuple(slice(c.start - a, c.stop - a) for c, a in zip(window.core, window.start, strict=True))
                target = window.core if axis is None else (chosen, *window.core)
                drawn = drawn[_last(core)][:, 0] if axis is None else drawn[_last(core)]
                tally.add(drawn)
                if kept is not None:
                    kept[(slice(None), *target)] = drawn.cpu().numpy()
            mean = fused.cpu()[_last(within)] * weight[within]
            where = inside if axis is None else (chosen, *inside)
            probabilities[(slice(None), *where)] += mean[0] if axis is None else mean.movedim(1, 0)
            progress(1 / len(found) / len(slabs))

    probabilities /= weights
    if axis is not None:
        probabilities = probabilities.movedim(1, axis + 1)
    if not torch.isfinite(probabilities.sum()):  # of all: a mask of each would be as large as they are
        raise UserError(model.path, "the probabilities it gives are not finite", "Train it again, at a lower train.lr.")
    if staple_wanted:
        assert masks is not None
        probabilities = torch.from_numpy(staple(masks, classes))
    return Prediction(probabilities, tally, keep)


def at_temperature(condition: Any, model: Model) -> Any:
    """Features with their mean logits divided by the calibrated temperature (Guo et al. 2017), so draws follow them."""
    fitted = model.about.calibration
    if fitted is None or fitted.temperature is None:
        return condition
    return replace(condition, mean_logits=condition.mean_logits / fitted.temperature)


class Noise:
    """Standard normal numbers of a volume, one set a (sample, call): slices and windows share them.

    Maps are on the volume's grid, `stride` times coarser; fields, on half of it, and vectors are for `conditional`.
    Drawn on the CPU, so that every device sees the same.
    """

    def __init__(self, seed: int, classes: int, padded: tuple[int, ...], stride: int) -> None:
        self.seed, self.classes, self.padded, self.stride = seed, classes, padded, stride
        self.kept: dict[tuple[int, ...], Tensor] = {}

    def map(self, sample_index: int, call: int, window: Window) -> Float[Tensor, "classes *coarse"]:
        """The window's part."""
        whole = self._draw((0, sample_index, call), (self.classes, *(length // self.stride for length in self.padded)))
        inside = zip(window.start, window.size, strict=True)
        return whole[(slice(None), *(slice(a // self.stride, (a + s) // self.stride) for a, s in inside))]

    def vector(self, sample_index: int, call: int) -> Float[Tensor, "classes numbers"]:
        """What all of the volume shares."""
        return self._draw((1, sample_index, call), (self.classes, SHARED))

    def fields(self, samples: range, call: int, window: Window) -> Float[Tensor, "draws classes scales *half"]:
        """The window's part. White noise repeats after REPEAT cells: that of a whole CT would fill the memory."""
        found = []
        for scale, spacing in enumerate(SPACINGS):
            reached = [cells(a, length, spacing) for a, length in zip(window.start, window.size, strict=True)]
            lengths = [min(REPEAT, len(cells(0, length, spacing))) for length in self.padded]
            shape = self.classes, *lengths
            white = torch.stack([self._draw((2 + scale, index, call), shape) for index in samples])
            for axis, (along, length) in enumerate(zip(reached, lengths, strict=True), start=2):
                white = white.index_select(axis, torch.tensor([place % length for place in along]))
            found.append(smooth(white, window.start, window.size, spacing))
        return torch.stack(found, dim=2)

    def _draw(self, key: tuple[int, int, int], shape: tuple[int, ...]) -> Tensor:
        whole = self.kept.get(key)
        if whole is None:
            whole = torch.randn(shape, generator=torch.Generator().manual_seed(_mix(self.seed, *key)))
            if sum(map(torch.numel, self.kept.values())) + whole.numel() <= NOISE_KEPT:
                self.kept[key] = whole
        return whole


@torch.inference_mode()
def trace(
    model: Model, image: Float[Tensor, "channels x y z"], *, steps: int, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """One sample of a whole prepared scan, in one window, call by call: the noisy mask and the mask drawn from it.

    Both are [classes, x, y, z]: the noisy one, an analog mask, repeated from its grid; the other, probabilities.
    """
    config, classes = model.about.config, len(model.about.labels)
    data, stride = config.data, STRIDE if config.network.kind == "conditional" else 1
    axis = data.axis if data.spatial_dims == 2 else None
    stack = image.to(model.device) if axis is None else image.to(model.device).movedim(axis + 1, 1)
    space = stack.shape[1:] if axis is None else stack.shape[2:]
    size = pad_to_stride(space, config.network.widths)
    window = Window((0,) * len(size), size, tuple(slice(0, n) for n in size))
    batch = stack[None] if axis is None else with_neighbours(stack, data.neighbours)
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(x_t: Tensor, soft: Tensor) -> None:
        both = nearest(x_t[0], stride) if stride > 1 else x_t[0], soft[0]
        noisy, drawn = (cut(x.cpu(), (0,) * len(space), space) for x in both)
        seen.append((noisy[0], drawn[0]) if axis is None else (noisy.movedim(0, axis + 1), drawn.movedim(0, axis + 1)))

    with autocast(model.device, config.train.precision):
        encoded = model.network.encode(cut(batch, window.start, size, outside(data.modality)))
        condition = at_temperature(encoded, model)
    _drawing(model)(model, condition, Noise(seed, classes, size, stride), range(1), window, steps, watch)
    return seen


def _last(box: tuple[slice, ...]) -> Any:
    """An index of the last dimensions."""
    return (..., *box)


def _slabs(count: int, size: tuple[int, ...]) -> list[slice]:
    batch = max(1, VOXELS_AT_ONCE // int(np.prod(size)))
    return [slice(a, min(a + batch, count)) for a in range(0, count, batch)]


def _sampled(
    model: Model, condition: Any, batch: int, noise: Noise, samples: int, window: Window, steps: int
) -> tuple[UInt8[Tensor, "samples batch *space"], Float[Tensor, "batch classes *space"]]:
    """Label indices of every sample, and the probabilities to report: of the mean head, else of the samples."""
    kind, fuse = model.about.config.network.kind, model.about.config.segment.fuse
    width = max(1, noise.classes // 4)  # many classes weigh more than the features
    together = max(1, VOXELS_AT_ONCE // (batch * int(np.prod(window.size)) * width))
    drawn, total = [], torch.zeros((), device=model.device)
    for start in range(0, samples, together):
        group = range(start, min(start + together, samples))
        soft = _drawing(model)(model, condition, noise, group, window, steps, None)
        drawn.append(to_labels(soft.flatten(0, 1)).unflatten(0, soft.shape[:2]))
        if kind in MASK_DENOISERS:
            total = total + (_votes(drawn[-1], soft.shape[2]) if fuse == "vote" else soft).sum(0)
    reported = total / samples if kind in MASK_DENOISERS else condition.mean_logits.softmax(1)
    return torch.cat(drawn), reported


def _votes(drawn: UInt8[Tensor, "draws batch *space"], classes: int) -> Float[Tensor, "draws batch {classes} *space"]:
    return one_hot(drawn.flatten(0, 1), classes).unflatten(0, drawn.shape[:2])


def _drawing(model: Model) -> Callable[..., Float[Tensor, "draws batch classes *space"]]:
    return _draw_at_once if model.about.config.network.kind == "conditional" else _draw_by_denoising


def _draw_at_once(
    model: Model, features: Features, noise: Noise, group: range, window: Window, steps: int, watch: Watch | None
) -> Float[Tensor, "draws batch classes *space"]:
    """Logits of the samples in `group`: a call draws a mask, from the noise that its volume's slices share."""
    config = model.about.config
    scale, batch = config.diffusion.scale, len(features.mean_logits)

    def of_batch(drawn: Tensor) -> Tensor:
        return drawn.to(model.device)[:, None].expand(-1, batch, *drawn.shape[1:])

    def maps(step: int) -> Tensor:
        return of_batch(torch.stack([noise.map(index, step, window) for index in group]))

    logits, call = torch.empty(0), 0

    def denoise(x_t: Tensor, alpha_bar: Tensor) -> Tensor:
        nonlocal logits, call
        level = alpha_bar.to(x_t).expand(batch)
        state = input_scale_wiener(level[0], scale) * (x_t[:1] if alpha_bar == 0 else x_t)  # pure noise says nothing
        shared = of_batch(torch.stack([noise.vector(index, call) for index in group]))
        fields = of_batch(noise.fields(group, call, window))
        call += 1
        with autocast(model.device, config.train.precision):
            logits = model.network.denoiser(features, state, level, shared, fields)
        if watch is not None:
            watch(x_t, logits.softmax(2))
        if call == steps:
            return x_t  # nobody reads on: the logits are the answer
        drawn = one_hot(to_labels(logits.flatten(0, 1)), logits.shape[2])
        return to_analog(pool(drawn, STRIDE), scale).unflatten(0, (-1, batch))

    unseen = steps == 1 and watch is None  # pure noise, which the network is not shown
    coarse = (length // STRIDE for length in window.size)
    x_T = torch.zeros(1, batch, noise.classes, *coarse, device=model.device) if unseen else maps(0)
    draw(config, denoise, x_T, steps, lambda step: maps(step + 1))
    return logits


def _draw_by_denoising(
    model: Model, condition: Condition, noise: Noise, group: range, window: Window, steps: int, watch: Watch | None
) -> Float[Tensor, "draws batch classes *space"]:
    """Soft masks of the samples in `group`: step by step from noise at full resolution, shared by a volume's slices."""
    config = model.about.config
    scale, batch = config.diffusion.scale, len(condition.maps[0])
    repeated = Condition(tuple(m.repeat(len(group), *(1,) * (m.ndim - 1)) for m in condition.maps), None)

    def maps(call: int) -> Tensor:
        drawn = torch.stack([noise.map(index, call, window) for index in group]).to(model.device)
        return drawn.repeat_interleave(batch, 0)

    def denoise(x_t: Tensor, alpha_bar: Tensor) -> Any:
        def call(x: Tensor, level: Tensor) -> Tensor:
            return model.network.denoise(repeated, input_scale(alpha_bar, scale) * x, level)

        x_0 = estimate(model, call, x_t, alpha_bar)
        if watch is not None:
            watch(*(x.unflatten(0, (-1, batch)) for x in (x_t, _soft(x_0, scale))))
        return x_0

    x_0 = draw(config, denoise, maps(0), steps, lambda step: maps(step + 1))
    if not torch.isfinite(x_0).all():
        raise UserError(model.path, "the masks it draws are not finite", "Train it again, at a lower train.lr.")
    return _soft(x_0, scale).unflatten(0, (-1, batch))


def _soft(x_0: Float[Tensor, "batch classes *space"], scale: float) -> Float[Tensor, "batch classes *space"]:
    """Probabilities from an analog mask; where it says nothing, background."""
    p = from_analog(x_0, scale)
    p[:, 0] += 1e-6
    return p / p.sum(1, keepdim=True)


def _mix(*numbers: int) -> int:
    """A seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
