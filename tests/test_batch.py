"""Training as the textbooks have it: a random time for each image, one forward pass, gradients gathered."""

import copy
from dataclasses import astuple

import pytest
import torch

from medseg_diff.config import Config
from medseg_diff.config_file import parse_config
from medseg_diff.datasets.cache import Volume
from medseg_diff.training.batch import Batch, draw_step, draw_times
from medseg_diff.training.state import begin
from medseg_diff.training.step import take_step

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
    assert first.noise.shape == (8, 1, 1, 16, 16)


def test_parts_are_the_batch(volumes):
    batch = draw_step(settings(batch_size=2, accumulate=3), volumes, 3, (0, 0), CPU, False)
    parts = list(batch.parts(3))
    assert [len(part.image) for part in parts] == [2, 2, 2]
    assert same(Batch(*(torch.cat(x) for x in zip(*map(astuple, parts), strict=True))), batch)


@pytest.mark.parametrize(
    ("kind", "task", "data", "shape"),
    [
        ("unet", "segment", {}, (0, 0, 16, 16)),
        ("conditional", "segment", {}, (5, 3, 4, 4)),
        ("medsegdiff_v1", "segment", {}, (1, 3, 16, 16)),
        ("unconditional", "generate", {"pairs": True}, (1, 4, 16, 16)),
    ],
)
def test_noise_has_the_shape_of_what_is_diffused(volumes, kind, task, data, shape):
    batch = draw_step(settings(kind, task, data=data), volumes, 3, (0, 0), CPU, False)
    assert batch.noise.shape == (2, *shape)


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
