"""Training as the textbooks have it: a random time for each image, one forward pass, gradients gathered."""

import copy
from dataclasses import astuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medseg_diff.config import Config
from medseg_diff.config_file import parse_config
from medseg_diff.datasets.cache import Volume
from medseg_diff.diffusion.fields import COARSE, SPACINGS
from medseg_diff.diffusion.losses import variational_term
from medseg_diff.diffusion.process import add_noise, target, x0_from
from medseg_diff.diffusion.schedule import alpha_bar
from medseg_diff.networks.conditional import SHARED
from medseg_diff.training.batch import Batch, draw_step, draw_times
from medseg_diff.training.objective import VolumeScore
from medseg_diff.training.state import begin
from medseg_diff.training.step import is_augmented, loss_of, take_step

CPU = torch.device("cpu")


def settings(kind: str = "unconditional", task: str = "generate", **changes) -> Config:
    content = {
        "task": task,
        "data": {
            "root": "x", "size": [16, 16], "spatial_dims": 2, "axis": 2, "neighbours": 0, "spacing_mm": [1, 1, 1],
            **changes.pop("data", {}),
        },
        "network": {"kind": kind, "widths": [8, 8, 8, 8]},
        "diffusion": changes.pop("diffusion", {}),
        "train": {"precision": "fp32", **changes},
    }  # fmt: skip
    return parse_config(content, "test")


@pytest.fixture(scope="module")
def volumes() -> list[Volume]:
    generator = torch.Generator().manual_seed(0)
    return [
        Volume(
            str(i),
            torch.randn(1, 20, 20, 6, generator=generator),
            torch.randint(0, 3, (1, 20, 20, 6), generator=generator, dtype=torch.uint8),
            (),
        )
        for i in range(3)
    ]


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(astuple(a), astuple(b), strict=True))


def test_a_step_is_its_seeds_and_every_image_has_a_time_of_its_own(volumes):
    config = settings(batch_size=8, augment=True, diffusion={"pure_noise": 0.0})
    first, again, other = (draw_step(config, volumes, 3, seed, CPU, True) for seed in ((0, 1), (0, 1), (0, 2)))
    assert same(first, again)
    assert not torch.equal(first.image, other.image)
    assert len(first.t.unique()) == 8
    assert first.noise.shape == (8, 1, 16, 16)


@pytest.mark.parametrize(("kind", "task"), [("unconditional", "generate"), ("conditional", "segment")])
def test_parts_are_the_batch(volumes, kind, task):
    batch = draw_step(settings(kind, task, batch_size=2, accumulate=3), volumes, 3, (0, 0), CPU, False, 2)
    parts = list(batch.parts(3))
    assert [len(part.image) for part in parts] == [2, 2, 2]
    assert same(Batch(*(torch.cat(x) for x in zip(*map(astuple, parts), strict=True))), batch)


@pytest.mark.parametrize(
    ("kind", "task", "data", "shape", "draws"),
    [
        ("unet", "segment", {}, (0, 16, 16), 0),
        ("conditional", "segment", {}, (3, 4, 4), 4),
        ("medsegdiff_v1", "segment", {}, (3, 16, 16), 0),
        ("unconditional", "generate", {"pairs": True}, (4, 16, 16), 0),
    ],
)
def test_noise_has_the_shape_of_what_is_diffused(volumes, kind, task, data, shape, draws):
    """And there is noise for so many draws as asked for."""
    batch = draw_step(settings(kind, task, data=data), volumes, 3, (0, 0), CPU, False, draws)
    assert batch.noise.shape == (2, *shape)
    assert batch.shared.shape == (2, draws, 3, SHARED)
    assert batch.fields.shape == (2, draws, 3, len(SPACINGS), 8, 8)


def test_draws_have_noise_of_their_own(volumes):
    """Of unit variance, and independent between crops, draws, classes and scales."""
    batch = draw_step(settings("conditional", "segment", batch_size=64), volumes, 3, (0, 0), CPU, False, 4)
    for noise in (batch.noise, batch.shared, batch.fields):
        assert noise.mean().abs() < 0.1
        assert noise.std().item() == pytest.approx(1, abs=0.1)
    centres = batch.fields[..., 4, 4]
    for axis in range(4):
        assert (centres * centres.roll(1, axis)).mean().abs() < 0.1


@pytest.mark.parametrize(
    ("kind", "task", "options"),
    [
        ("unconditional", "generate", {}),
        ("unconditional", "generate", {"data": {"pairs": True}, "diffusion": {"variance": "learned"}}),
        ("classic_unet", "segment", {}),
        ("medsegdiff_v1", "segment", {}),
    ],
)
def test_accumulated_passes_equal_the_large_batch(volumes, kind, task, options):
    """Six images in one pass, or in three of two: the same gradient, hence the same weights, step after step."""
    states = []
    for batch_size, accumulate in ((6, 1), (2, 3)):
        config = settings(kind, task, batch_size=batch_size, accumulate=accumulate, **copy.deepcopy(options))
        state = begin(config, 1, 3, CPU)
        losses = []
        for state.step in range(2):
            losses.append(take_step(state, config, volumes, 3))
        gradients = {name: p.grad.clone() for name, p in state.network.named_parameters() if p.grad is not None}
        states.append((losses, gradients))
    (whole, gradients), (parted, gathered) = states
    assert parted == pytest.approx(whole, rel=1e-4)
    assert gradients.keys() == gathered.keys()
    largest = max(float(g.abs().max()) for g in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gathered[name], gradient, rtol=1e-2, atol=2e-4 * largest, msg=name)


def test_one_pass_of_three_is_not_the_large_batch(volumes):
    """What the test above would see if the passes after the first were lost."""
    found = []
    for accumulate in (1, 3):
        config = settings(batch_size=2, accumulate=accumulate)
        state = begin(config, 1, 3, CPU)
        take_step(state, config, volumes, 3)
        found.append(torch.cat([p.grad.flatten() for p in state.network.parameters()]))
    assert (found[0] - found[1]).norm() > 0.1 * found[1].norm()


def test_times_lie_on_the_grid():
    t = draw_times(1000, 4, 0.0, torch.Generator().manual_seed(0))
    assert t.unique().tolist() == [0.25, 0.5, 0.75, 1.0]


DIFFUSION = {
    "schedule": "sigmoid", "zero_terminal": False, "log_snr_shift": -0.9, "train_steps": 7, "scale": 0.7,
    "prediction": "noise", "pure_noise": 0.0,
}  # fmt: skip
ENDS_IN_NOISE = DIFFUSION | {
    "zero_terminal": True, "schedule": "linear", "log_snr_shift": 2.5, "prediction": "velocity",
}  # fmt: skip


class Stub(nn.Module):
    """Keeps what it is called with, and answers with the same numbers always."""

    def __init__(self, *answer: Tensor | None) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        self.inputs = inputs
        return self.answer if len(self.answer) > 1 else self.answer[0]


def batch_of(maps: int, side: int = 16, draws: int = 0) -> tuple[Batch, Tensor]:
    """The times t = 1/7, 4/7 and 1, and the one-hot labels."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 3, (3, 16, 16), generator=generator)
    half = 16 // COARSE
    shapes = (3, 1, 16, 16), (3, maps, side, side), (3, draws, 3, SHARED), (3, draws, 3, len(SPACINGS), half, half)
    image, *noises = (torch.randn(shape, generator=generator) for shape in shapes)
    batch = Batch(image, labels, torch.tensor([1, 4, 7]).double() / 7, *noises)
    return batch, torch.stack([labels == k for k in range(3)], 1).float()


def level_of(diffusion: dict, t: Tensor) -> Tensor:
    return alpha_bar(
        diffusion["schedule"], t, zero_terminal=diffusion["zero_terminal"], shift=diffusion["log_snr_shift"]
    )


def along(x: Tensor) -> Tensor:
    return x.float()[:, None, None, None]


def test_times_lie_on_the_configured_grid(volumes):
    t = draw_step(settings(batch_size=40, diffusion=DIFFUSION), volumes, 3, (0, 0), CPU, False).t
    assert t.mul(7).round(decimals=9).unique().tolist() == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("diffusion", [DIFFUSION, ENDS_IN_NOISE])
@pytest.mark.parametrize("kind", ["classic_unet", "medsegdiff_v1"])
def test_a_denoiser_of_masks_is_told_the_level_of_its_noise(kind, diffusion):
    batch, truth = batch_of(3)
    stub = Stub(torch.zeros(3, 3, 16, 16), None)
    loss = loss_of(stub, VolumeScore(3), settings(kind, "segment", diffusion=diffusion), batch, torch.ones(3), False)
    level, x_0, noise = level_of(diffusion, batch.t), 0.7 * (2 * truth - 1), batch.noise
    image, x, told = stub.inputs
    assert image is batch.image
    torch.testing.assert_close(told, level.float())
    variance = level * 0.7**2 + 1 - level
    torch.testing.assert_close(x, add_noise(x_0, noise, level) / along(variance.sqrt()))
    wanted = target(diffusion["prediction"], x_0, noise, level)
    assert loss.item() == pytest.approx(wanted.square().mean().item(), rel=1e-5)


def test_draws_are_told_the_level_of_their_noise():
    diffusion = ENDS_IN_NOISE | {"draws": 2}
    batch, truth = batch_of(3, side=4, draws=2)
    stub = Stub(torch.zeros(2, 3, 3, 16, 16))
    config = settings("conditional", "segment", diffusion=diffusion)
    loss_of(stub, VolumeScore(3), config, batch, torch.ones(3), False)
    level = level_of(diffusion, batch.t)
    x_t = add_noise(0.7 * (2 * torch.nn.functional.avg_pool2d(truth, 4) - 1), batch.noise, level)
    image, x, told, shared, fields = stub.inputs
    assert image is batch.image
    torch.testing.assert_close(told, level.float())
    factor = along(level.sqrt() * 0.7 / (level * 0.7**2 + 1 - level))
    torch.testing.assert_close(x, (factor * x_t)[None])
    assert torch.equal(shared, batch.shared.movedim(1, 0))
    assert torch.equal(fields, batch.fields.movedim(1, 0))


def test_a_batch_without_draws_teaches_the_mean_head():
    batch, _ = batch_of(3, side=4)
    stub = Stub(torch.zeros(3, 3, 16, 16))
    config = settings("conditional", "segment")
    weights = torch.ones(3), torch.tensor([1.0, 1.0, 2.0])
    plain, weighted = (loss_of(stub, VolumeScore(3), config, batch, weight, False) for weight in weights)
    assert len(stub.inputs) == 1
    assert plain.item() == pytest.approx(np.log(3))
    assert plain < weighted, "the weights of the classes reach the loss"


@pytest.mark.parametrize("diffusion", [DIFFUSION, ENDS_IN_NOISE])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("variance", ["small", "learned"])
def test_a_denoiser_of_images_is_told_the_level_of_its_noise(diffusion, pairs, variance):
    """The variance is learned for the step to the next time of training's own grid, whose steps add to the bound."""
    batch, truth = batch_of(4 if pairs else 1)
    level, noise = level_of(diffusion, batch.t), batch.noise
    x_0 = torch.cat([batch.image, 0.7 * (2 * truth - 1)], 1) if pairs else batch.image
    generator = torch.Generator().manual_seed(5)
    error, logits = (torch.randn(x_0.shape, generator=generator) for _ in range(2))
    output = target(diffusion["prediction"], x_0, noise, level) + 0.1 * error
    stub = Stub(torch.cat([output, logits], 1) if variance == "learned" else output)
    config = settings(data={"pairs": pairs}, diffusion=diffusion | {"variance": variance})
    loss = loss_of(stub, VolumeScore(3), config, batch, torch.ones(3), False)
    x_t, told = stub.inputs
    torch.testing.assert_close(told, level.float())
    torch.testing.assert_close(x_t, add_noise(x_0, noise, level))
    expected = (0.1 * error).square().mean().item()
    if variance == "learned":
        cleaner = level_of(diffusion, torch.tensor([0, 3, 6]).double() / 7)
        estimate = x0_from(diffusion["prediction"], x_t, output, level)
        bound = variational_term(x_0, x_t, estimate, logits.sigmoid(), level, cleaner).mean().item() * 7 / 1000
        assert bound > 1e-3 * expected, "or the comparison would not see it"
        expected += bound
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_condition_model_is_taught_every_so_many_steps(volumes):
    """No other loss reaches its head."""
    config = settings("medsegdiff_v2", "segment", condition_every=3)
    state = begin(config, 1, 3, CPU)
    taught = []
    for state.step in range(6):
        take_step(state, config, volumes, 3)
        taught.append(any(bool(p.grad.any()) for p in state.network.condition_head.parameters()))
    assert taught == [True, False, False, True, False, False]


@pytest.mark.parametrize(("cases", "first"), [(1000, 75), (62, 85), (6, 99)])
def test_what_comes_last_is_not_augmented(cases, first):
    """A quarter of 100 steps with two passes of ten crops, or as many as show each case five times."""
    config = settings("unet", "segment", steps=100, batch_size=10, accumulate=2)
    state = begin(config, 1, 3, CPU)
    changed = []
    for state.step in range(100):
        changed.append(is_augmented(state, config, cases))
    assert changed == [step < first for step in range(100)]


def test_the_denoiser_sees_augmented_crops_to_the_end():
    config = settings("conditional", "segment", steps=100)
    state = begin(config, 1, 3, CPU)
    state.step = 80
    assert not is_augmented(state, config, 1000)
    state.teach_denoiser()
    state.step = 99
    assert is_augmented(state, config, 1000)
