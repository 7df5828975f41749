"""Our samplers against the schedulers of diffusers, over whole runs with the same levels and the same noises.

Theirs compute in single precision, hence 1e-5. Importing them takes some seconds and fetches nothing.
"""

import pytest
import torch
from diffusers.schedulers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
)
from known_laws import F64, generator, mixture_mean, normal

from medseg_diff.diffusion.process import step_variance
from medseg_diff.diffusion.sampler import dynamic_threshold, sample
from medseg_diff.diffusion.schedule import levels

STEPS = 20
N = 40
SPACINGS = ("trailing", "leading", "linspace")
COMMON = {"beta_schedule": "linear", "prediction_type": "sample"}
UNCLIPPED = {**COMMON, "clip_sample": False}

denoise = mixture_mean(*(torch.tensor(v, dtype=F64) for v in ([0.3, 0.7], [-0.8, 0.5], 0.2)))


def noises(step: int) -> torch.Tensor:
    return normal(N, seed=100 + step)


def column(step: int) -> torch.Tensor:
    return noises(step)[:, None]


def path_of(scheduler) -> torch.Tensor:
    """The levels that a scheduler walks, and clean."""
    scheduler.set_timesteps(STEPS)
    steps = scheduler.timesteps.long().unique_consecutive()
    return torch.cat([scheduler.alphas_cumprod[steps], torch.ones(1)]).double()


def run(scheduler, path: torch.Tensor, **options) -> torch.Tensor:
    """The scheduler's own loop, over one channel; the options are functions of the step."""
    x = normal(N)
    for i, (t, level) in enumerate(zip(scheduler.timesteps, path, strict=False)):
        more = {name: value(i) for name, value in options.items()}
        x = scheduler.step(denoise(x, level)[:, None], t, x[:, None], **more).prev_sample[:, 0]
    return x


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.std() > 0.1  # something was sampled
    torch.testing.assert_close(ours, theirs.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1000, 100, 20, 7])
def test_levels_take_diffusers_timesteps(spacing, steps):
    """diffusers rounds trailing times to its 1000, ours are even; they differ where the steps do not divide 1000."""
    scheduler = DDPMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    curve = levels("linear", 1000, zero_terminal=False).flip(0)  # index 0 is clean: theirs is the time before
    ours, theirs = levels("linear", steps, spacing=spacing, zero_terminal=False)[:-1], curve[scheduler.timesteps + 1]
    if spacing == "trailing" and steps == 7:
        half = curve[(scheduler.timesteps + 2).clamp(max=1000)], curve[scheduler.timesteps]
        assert ((half[0] <= ours) & (ours <= half[1])).all()
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim(spacing, eta):
    """Not linspace: there diffusers goes on to t - 50 and takes that for the next t, which is not where it went."""
    scheduler = DDIMScheduler(**UNCLIPPED, timestep_spacing=spacing)
    path = path_of(scheduler)
    theirs = run(scheduler, path, eta=lambda step: eta, variance_noise=column)
    assert_same(sample(denoise, normal(N), path, method="ddim", eta=eta, noise=noises), theirs)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm(spacing, variance):
    """The last step of trailing ends at clean, yet diffusers adds noise to it: compared before that."""
    scheduler = DDPMScheduler(**UNCLIPPED, timestep_spacing=spacing, variance_type=f"fixed_{variance}")
    path = path_of(scheduler)
    if spacing == "trailing":
        path, scheduler.timesteps = path[:-1], torch.cat([scheduler.timesteps, torch.tensor([-1])])
    theirs = run(scheduler, path[:-1], generator=generator_of)
    assert_same(sample(denoise, normal(N), path, method="ddpm", variance=variance, noise=noises), theirs)


def generator_of(step: int) -> torch.Generator:
    """The generator that draws `noises(step)`."""
    return generator(100 + step)


def test_learned_variance():
    """diffusers' learned_range is the logarithm of ours; its network answers in [-1, 1]."""
    scheduler = DDPMScheduler(**UNCLIPPED)
    path = path_of(scheduler)
    fraction = normal(N, seed=3).sigmoid()
    for t, level, cleaner in zip(scheduler.timesteps[:-1], path, path[1:], strict=False):
        log_variance = scheduler._get_variance(t, 2 * fraction - 1, "learned_range")
        ours = step_variance("learned", fraction, level, cleaner, fraction)
        torch.testing.assert_close(ours.log(), log_variance, rtol=0, atol=1e-3)  # 1 - alpha_bar in single precision


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("method", "algorithm"), [("dpm++", "dpmsolver++"), ("dpm++sde", "sde-dpmsolver++")])
def test_dpm_solver(spacing, method, algorithm):
    scheduler = DPMSolverMultistepScheduler(**COMMON, timestep_spacing=spacing, algorithm_type=algorithm)
    path = path_of(scheduler)
    theirs = run(scheduler, path, variance_noise=column)
    assert_same(sample(denoise, normal(N), path, method=method, noise=noises), theirs)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_heun(spacing):
    """diffusers walks x / sqrt(alpha_bar). Not linspace: its times lie between two levels there."""
    scheduler = HeunDiscreteScheduler(**COMMON, timestep_spacing=spacing)
    path = path_of(scheduler)
    each = torch.cat([path[:1], path[1:-1].repeat_interleave(2)])
    y = normal(N) / path[0].sqrt()
    for t, level in zip(scheduler.timesteps, each, strict=True):
        y = scheduler.step(denoise(level.sqrt() * y, level), t, y).prev_sample
    assert_same(sample(denoise, normal(N), path, method="heun"), y)


def test_dynamic_threshold():
    """diffusers interpolates between two magnitudes and we take the upper; with many they are neighbours."""
    x_0 = 2 * normal(3, 1, 100, 100)
    x_0[2] /= 10
    theirs = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=100.0)
    torch.testing.assert_close(dynamic_threshold(x_0, 1.0, 0.9), theirs._threshold_sample(x_0), rtol=2e-3, atol=0)
