"""What joins the samplers to a network: every setting of sampling reaches it, for masks and for images."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LABELS
from torch import Tensor, nn

from medseg_diff.checkpoint import Description, Model
from medseg_diff.config_file import parse_config
from medseg_diff.denoising import method_of, path_of
from medseg_diff.diffusion.process import x0_from
from medseg_diff.diffusion.sampler import clip, dynamic_threshold, sample
from medseg_diff.diffusion.schedule import levels
from medseg_diff.errors import UserError
from medseg_diff.generate import _noise, generate_images
from medseg_diff.inference import Noise, predict
from medseg_diff.networks.blocks import Condition, nearest
from medseg_diff.networks.conditional import Features
from medseg_diff.windows import Window

SIDE, SLICES, CLASSES, SAMPLES, STEPS, SEED = 16, 2, len(LABELS), 3, 5, 4
WINDOW = Window((0, 0), (SIDE, SIDE), (slice(0, SIDE), slice(0, SIDE)))
Calls = list[tuple[Tensor, ...]]


def answer(x: Tensor, level: Tensor) -> Tensor:
    """Of what it is told alone, and of all of it."""
    level = level.to(x).reshape(-1, 1, 1, 1)
    return (0.8 + 0.5 * level) * x.roll(1, 1) - 0.3 * x.roll(1, -1) + 0.2 * level


class Stub(nn.Module):
    """Keeps what it is called with; a denoiser of masks that never looks at the image, or one of images."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Calls = []

    def encode(self, image: Tensor) -> Condition:
        return Condition((image,), None)

    def denoise(self, condition: Condition, x: Tensor, level: Tensor) -> Tensor:
        return self(x, level)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        self.calls.append((x, level))
        return answer(x, level)


class Spread(Stub):
    """Answers in its first half with x_0, in its second with the logits of the fraction of the variance."""

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        self.calls.append((x, level))
        return torch.cat([answer(x, level), logits(x, level)], 1)


def logits(x: Tensor, level: Tensor) -> Tensor:
    return x.flip(-1) + 4 * level.to(x).reshape(-1, 1, 1, 1) - 1


def model(
    network: nn.Module,
    task: str,
    diffusion: dict[str, Any],
    segment: dict[str, Any],
    kind: str | None = None,
    **data: Any,
) -> Model:
    content = {
        "task": task,
        "data": {
            "root": "x", "size": [SIDE, SIDE], "spatial_dims": 2, "axis": 0, "neighbours": 0,
            "spacing_mm": [1, 1, 1], "modality": "ct", **data,
        },
        "network": {"kind": kind or ("medsegdiff_v1" if task == "segment" else "unconditional"), "widths": [8] * 4},
        "diffusion": diffusion,
        "train": {"precision": "fp32"},
        "segment": segment,
    }  # fmt: skip
    about = Description(parse_config(content, "test"), LABELS, ("CT",), {}, {}, {})
    return Model(network, about, Path("nowhere"), "", torch.device("cpu"))


SETTINGS = {
    "ddim": (
        {"schedule": "sigmoid", "zero_terminal": False, "log_snr_shift": -1.5, "train_steps": 52, "scale": 0.7,
         "prediction": "noise"},
        {"spacing": "leading", "sampler": "ddim", "eta": 0.6, "limit": "clip"},
    ),
    "heun": (
        {"schedule": "linear", "log_snr_shift": 0.8, "train_steps": 40, "scale": 0.3},
        {"spacing": "log_snr", "sampler": "heun", "limit": "dynamic"},
    ),
    "ddpm": (
        {"schedule": "quadratic", "zero_terminal": False, "log_snr_shift": 0.5, "train_steps": 30, "scale": 1.4,
         "prediction": "x0", "variance": "large"},
        {"spacing": "linspace"},
    ),
    "dpm++": (
        {"schedule": "scaled_linear", "zero_terminal": False, "log_snr_shift": -0.4, "scale": 0.6},
        {"spacing": "trailing", "limit": "clip"},
    ),
    "dpm++sde": (
        {"schedule": "cosine", "log_snr_shift": 1.2, "train_steps": 25, "scale": 0.5},
        {"spacing": "log_snr", "sampler": "dpm++sde"},
    ),
}  # fmt: skip
"""As a user would write them, under the name of the sampler that they lead to."""

SAMPLED = {
    "ddim": partial(
        sample,
        levels=levels("sigmoid", STEPS, spacing="leading", train_steps=52, zero_terminal=False, shift=-1.5),
        method="ddim",
        eta=0.6,
    ),
    "heun": partial(
        sample, levels=levels("linear", STEPS, spacing="log_snr", train_steps=40, shift=0.8), method="heun"
    ),
    "ddpm": partial(
        sample,
        levels=levels("quadratic", STEPS, spacing="linspace", train_steps=30, zero_terminal=False, shift=0.5),
        method="ddpm",
        variance="large",
    ),
    "dpm++": partial(sample, levels=levels("scaled_linear", STEPS, zero_terminal=False, shift=-0.4), method="dpm++"),
    "dpm++sde": partial(
        sample, levels=levels("cosine", STEPS, spacing="log_snr", train_steps=25, shift=1.2), method="dpm++sde"
    ),
}
"""What they mean."""

PREDICTIONS = {"ddim": "noise", "ddpm": "x0"}
LIMITS = {"ddim": clip, "heun": dynamic_threshold, "dpm++": clip}


def assert_same_calls(found: Calls, expected: Calls) -> None:
    assert len(found) == len(expected)
    for (x, level), (expected_x, expected_level) in zip(found, expected, strict=True):
        assert level.shape == (len(x),), "one level an item"
        torch.testing.assert_close(level, expected_level.to(level).expand(len(x)), atol=0, rtol=1e-6)
        torch.testing.assert_close(x, expected_x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_masks_are_sampled_as_configured(name):
    diffusion, segment = SETTINGS[name]
    scale, prediction = diffusion["scale"], PREDICTIONS.get(name, "velocity")
    noise, calls = Noise(SEED, CLASSES, (SIDE, SIDE), 1), []

    def maps(call: int) -> Tensor:
        """Slices share the noise of their sample."""
        return torch.stack([noise.map(index, call, WINDOW) for index in range(SAMPLES)]).repeat_interleave(SLICES, 0)

    def denoise(x_t: Tensor, alpha_bar: Tensor) -> Tensor:
        x = x_t / float(scale**2 * alpha_bar + 1 - alpha_bar) ** 0.5
        calls.append((x, alpha_bar))
        return x0_from(prediction, x_t, answer(x, alpha_bar), alpha_bar)

    limit = partial(LIMITS[name], bound=scale) if name in LIMITS else None
    x_0 = SAMPLED[name](denoise, maps(0), noise=lambda step: maps(step + 1), limit=limit)
    p = ((x_0 / scale + 1) / 2).clamp(0, 1) + 1e-6 * torch.eye(CLASSES)[0].reshape(-1, 1, 1)
    soft = (p / p.sum(1, keepdim=True)).unflatten(0, (SAMPLES, SLICES))

    stub, keep = Stub(), np.empty((SAMPLES, SLICES, SIDE, SIDE), np.uint8)
    found = predict(
        model(stub, "segment", diffusion, segment),
        torch.zeros(1, SLICES, SIDE, SIDE),
        samples=SAMPLES,
        steps=STEPS,
        seed=SEED,
        keep=keep,
    )
    assert_same_calls(stub.calls, calls)
    torch.testing.assert_close(found.probabilities.movedim(1, 0), soft.mean(0), atol=1e-4, rtol=0)
    assert (keep == soft.argmax(2).numpy()).mean() > 0.999, "only a tie may fall otherwise"
    assert len(np.unique(keep)) == CLASSES


class Drawing(Stub):
    """A denoiser that draws masks in one call, on a grid four times finer than the noisy mask's."""

    def encode(self, image: Tensor) -> Features:
        return Features(torch.zeros(len(image), CLASSES, SIDE, SIDE), ())

    def denoiser(self, features: Features, x: Tensor, level: Tensor, shared: Tensor, fields: Tensor) -> Tensor:
        self.calls.append((x, level, shared, fields))
        return mask_logits(x, level[0], shared, fields)


def mask_logits(x: Tensor, level: Tensor, shared: Tensor, fields: Tensor) -> Tensor:
    state, detail = (
        nearest(y.flatten(0, 1), stride).unflatten(0, y.shape[:2]) for y, stride in ((2 * x, 4), (fields.sum(3), 2))
    )
    said = state + detail + shared.sum(3)[..., None, None]
    return answer(said.flatten(0, 1), level).unflatten(0, said.shape[:2])


@pytest.mark.parametrize(("sampler", "method"), [("auto", "ddpm"), ("ddim", "ddim")])
def test_draws_are_sampled_as_configured(sampler, method):
    """The noise of a draw is fresh at every call, and pure noise is one x_t for all; the last draw is reported."""
    scale, noise, calls, drawn = 0.3, Noise(SEED, CLASSES, (SIDE, SIDE), 4), [], []

    def one_fields(index: int, call: int, window: Window) -> Tensor:
        return noise.fields(range(index, index + 1), call, window)[0]

    def of_slices(one: Callable[..., Tensor], *arguments: Any) -> Tensor:
        of_samples = torch.stack([one(index, *arguments) for index in range(SAMPLES)])
        return of_samples[:, None].expand(-1, SLICES, *of_samples.shape[1:])

    def denoise(x_t: Tensor, alpha_bar: Tensor) -> Tensor:
        a = float(alpha_bar)
        x = a**0.5 * scale / (a * scale**2 + 1 - a) * x_t if calls else torch.zeros(1, *x_t.shape[1:])
        call = len(calls)
        calls.append((x, alpha_bar, of_slices(noise.vector, call), of_slices(one_fields, call, WINDOW)))
        drawn.append(mask_logits(x, alpha_bar, *calls[-1][2:]))
        hard = nn.functional.one_hot(drawn[-1].argmax(2), CLASSES).movedim(-1, 2).float()
        return scale * (2 * nn.functional.avg_pool2d(hard.flatten(0, 1), 4) - 1).unflatten(0, hard.shape[:2])

    path = levels("linear", STEPS, spacing="log_snr", train_steps=40, shift=0.8)
    x_T = of_slices(noise.map, 0, WINDOW)
    sample(denoise, x_T, path, method=method, eta=0.6, noise=lambda step: of_slices(noise.map, step + 1, WINDOW))
    diffusion = {"schedule": "linear", "log_snr_shift": 0.8, "train_steps": 40, "scale": scale}
    segment = {"spacing": "log_snr", "sampler": sampler, "eta": 0.6}
    stub, keep = Drawing(), np.empty((SAMPLES, SLICES, SIDE, SIDE), np.uint8)
    predict(
        model(stub, "segment", diffusion, segment, "conditional"),
        torch.zeros(1, SLICES, SIDE, SIDE),
        samples=SAMPLES,
        steps=STEPS,
        seed=SEED,
        keep=keep,
    )
    assert len(stub.calls) == len(calls) == STEPS
    for (x, level, *noises), (expected_x, expected_level, *expected) in zip(stub.calls, calls, strict=True):
        torch.testing.assert_close(level, expected_level.float().expand(SLICES), atol=0, rtol=1e-6)
        torch.testing.assert_close(x, expected_x, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(noises, expected)
    assert (keep == drawn[-1].argmax(2).numpy()).mean() > 0.999


def noise_of_images(channels: int):
    """The noise of the images, from the first call on."""
    return lambda call: torch.stack([_noise((channels, SIDE, SIDE), SEED, i, call) for i in range(SAMPLES)])


@pytest.mark.parametrize("name", SETTINGS)
def test_images_are_sampled_as_configured(name):
    """Unlike masks they have unit variance: nothing is scaled, and ct lies in [-1, 1] whatever the scale of masks."""
    prediction, noise, calls = PREDICTIONS.get(name, "velocity"), noise_of_images(1), []

    def denoise(x_t: Tensor, alpha_bar: Tensor) -> Tensor:
        calls.append((x_t, alpha_bar))
        return x0_from(prediction, x_t, answer(x_t, alpha_bar), alpha_bar)

    limit = partial(LIMITS[name], bound=1.0) if name in LIMITS else None
    expected = SAMPLED[name](denoise, noise(0), noise=lambda step: noise(step + 1), limit=limit)
    stub = Stub()
    found = generate_images(model(stub, "generate", *SETTINGS[name]), SAMPLES, steps=STEPS, seed=SEED)
    assert_same_calls(stub.calls, calls)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("pairs", "prediction"), [(False, "x0"), (True, "velocity")])
def test_a_learned_variance_is_the_fraction_of_the_second_half(pairs, prediction):
    """Step by step as Nichol & Dhariwal 2021, eq. 15, has it."""
    path = levels("linear", STEPS, spacing="linspace", train_steps=30, shift=-0.7)
    noise = noise_of_images(1 + CLASSES if pairs else 1)
    x, calls = noise(0), []
    for step in range(STEPS):
        t, s = path[step], path[step + 1]
        calls.append((x, t))
        x_0 = x0_from(prediction, x, answer(x, t), t)
        large = 1 - t / s
        mean = float(s.sqrt() * large / (1 - t)) * x_0 + float((t / s).sqrt() * (1 - s) / (1 - t)) * x
        if s < 1:
            v, small = 1 / (1 + (-logits(x, t)).exp()), large * (1 - s) / (1 - t)
            mean = mean + ((v * large.log() + (1 - v) * small.log()) / 2).exp().float() * noise(step + 1)
        x = mean
    diffusion = {
        "schedule": "linear", "log_snr_shift": -0.7, "train_steps": 30, "prediction": prediction,
        "variance": "learned",
    }  # fmt: skip
    stub = Spread()
    learned = model(stub, "generate", diffusion, {"spacing": "linspace"}, pairs=pairs)
    found = generate_images(learned, SAMPLES, steps=STEPS, seed=SEED)
    assert_same_calls(stub.calls, calls)
    torch.testing.assert_close(found, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("task", "diffusion", "expected"),
    [
        ("segment", {}, "dpm++"),
        ("segment", {"variance": "large"}, "ddpm"),
        ("generate", {}, "dpm++"),
        ("generate", {"variance": "learned"}, "ddpm"),
    ],
)
def test_the_sampler_that_auto_means(task, diffusion, expected):
    assert method_of(model(Stub(), task, diffusion, {}).about.config) == expected


def test_more_steps_than_the_spacing_has_are_the_users_error():
    config = model(Stub(), "generate", {"train_steps": 30}, {"spacing": "linspace"}).about.config
    assert len(path_of(config, 30)) == 31
    with pytest.raises(UserError, match="31"):
        path_of(config, 31)
