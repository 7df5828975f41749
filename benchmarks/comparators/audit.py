"""What the noisy mask x_t contributes to ours: it is replaced on its way into the denoiser, and the rest stays.

- "noise": independent noise of x_t's own variance, at every call.
- "reference", "another's reference": x_t is made at time FORCED_T from the case's reference, or from that of the next.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from comparators.judge import judge
from comparators.ours import predict
from comparators.protocol import Prediction, Run, volumes_of
from medseg_diff.checkpoint import Model
from medseg_diff.config import Config
from medseg_diff.datasets.cache import Volume
from medseg_diff.datasets.slices import cut
from medseg_diff.denoising import resampled
from medseg_diff.diffusion.masks import one_hot, pool, to_analog
from medseg_diff.diffusion.process import add_noise, input_scale_wiener
from medseg_diff.diffusion.schedule import alpha_bar
from medseg_diff.networks.conditional import STRIDE
from medseg_diff.windows import pad_to_stride

FORCED_T = 0.4

Replace = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Scaled x_t [draws, batch, classes, *coarse] and alpha_bar [batch] -> what the denoiser gets in their place."""


def perform(run: Run, model: Model) -> dict[str, Any]:
    """Scores by what the denoiser was given."""
    config, names = model.about.config, model.about.labels
    _, _, validation = volumes_of(run, config)
    assert config.data.spacing_mm is not None, "the shipped configurations of the hippocampus name it"

    def scores(steps: int, replacing: Callable[[int], Replace] | None) -> dict[str, Any]:
        sampler = resampled(model, steps=steps)

        def predictions() -> Iterator[tuple[Volume, Prediction]]:
            for index, volume in enumerate(validation):
                with replaced(model, replacing(index) if replacing else None):
                    yield volume, predict(sampler, volume, run.samples, index)

        return judge(predictions(), names, config.data.spacing_mm)

    def from_case(offset: int) -> Callable[[int], Replace]:
        def of(index: int) -> Replace:
            shape, other = validation[index].image.shape[1:], validation[(index + offset) % len(validation)]
            return forced(coarse_mask(other.labels[0], shape, config, len(names)), config, index)

        return of

    given = {
        "1 step: x_t": scores(1, None),
        "1 step: noise": scores(1, lambda index: noise(config, index)),
        "4 steps: x_t": scores(4, None),
        "4 steps: noise": scores(4, lambda index: noise(config, index)),
        f"t = {FORCED_T}: reference": scores(1, from_case(0)),
        f"t = {FORCED_T}: another's reference": scores(1, from_case(1)),
        f"t = {FORCED_T}: noise": scores(1, lambda index: forced(None, config, index)),
    }
    return {"given": given}


@contextmanager
def replaced(model: Model, replace: Replace | None) -> Iterator[None]:
    """Stands between sampler and denoiser."""

    def before(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        features, x_t, level, shared, fields = arguments
        one_each = x_t.expand(len(shared), *x_t.shape[1:])
        return features, *replace(one_each, level), shared, fields

    handle = model.network.denoiser.register_forward_pre_hook(before) if replace else None
    try:
        yield
    finally:
        if handle:
            handle.remove()


def noise(config: Config, seed: int) -> Replace:
    generator = torch.Generator().manual_seed(seed)
    scale = config.diffusion.scale

    def replace(x_t: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        deviation = (level[0] * scale**2 + 1 - level[0]).sqrt()
        drawn = torch.randn(x_t.shape, generator=generator).to(x_t)
        return input_scale_wiener(level[0], scale) * deviation * drawn, level

    return replace


def forced(x_0: Tensor | None, config: Config, seed: int) -> Replace:
    """x_t at FORCED_T, of x_0 [batch, classes, *coarse] with other noise for each draw; without x_0, noise alone."""
    diffusion, generator = config.diffusion, torch.Generator().manual_seed(seed)
    t = torch.tensor([FORCED_T], dtype=torch.float64)
    level = alpha_bar(diffusion.schedule, t, zero_terminal=diffusion.zero_terminal, shift=diffusion.log_snr_shift)

    def replace(x_t: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        new = level.to(old).expand(len(old))
        if x_0 is None:
            return noise(config, seed)(x_t, new)
        drawn = torch.randn(x_t.shape, generator=generator).to(x_t)
        noisy = add_noise(x_0.to(x_t).expand_as(x_t), drawn, level[0].to(x_t))
        return input_scale_wiener(new[0], diffusion.scale) * noisy, new

    return replace


def coarse_mask(labels: Tensor, shape: tuple[int, ...], config: Config, classes: int) -> Tensor:
    """A label map [x, y, z] as the clean state, in the place of a scan of `shape` as inference pads it."""
    placed = cut(labels, (0, 0, 0), shape).long()
    flat = config.data.spatial_dims == 2
    batch = placed.movedim(config.data.axis, 0) if flat else placed[None]
    space = tuple(batch.shape[1:])
    padded = cut(batch, (0,) * len(space), pad_to_stride(space, config.network.widths))
    return to_analog(pool(one_hot(padded, classes), STRIDE), config.diffusion.scale)
