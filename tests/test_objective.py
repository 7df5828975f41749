import math

import pytest
import torch
from torch import Tensor, nn

from medseg_diff.diffusion.masks import one_hot
from medseg_diff.diffusion.process import noise_from_x0, velocity
from medseg_diff.networks import build_network
from medseg_diff.training.objective import EnergyScore, conditional_loss, draw_levels, generation_loss, unet_loss

SIDE = 16
TYPICAL = (math.sqrt(SIDE**2) + math.sqrt((SIDE / 4) ** 2) + 1 + 1) / 4
"""Mean over the scales of the distance between an empty and a full mask of SIDE x SIDE."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain_score() -> EnergyScore:
    """Without the running scales."""
    score = EnergyScore().eval()
    score.typical.fill_(1)
    return score


def even(values: Tensor) -> Tensor:
    """Masks of one class that have the same value everywhere."""
    return values[..., None, None, None].expand(*values.shape, 1, SIDE, SIDE)


@pytest.mark.parametrize(
    ("draws", "truth", "score"),
    [
        ([1, 1], 1, 0),
        ([0, 0], 1, 1),
        ([0, 1], 1, 1 / 2 - 1 / 2),
        ([0.5, 0], 1, 3 / 4 - 1 / 4),
        ([0, 0, 1], 1, 2 / 3 - 2 / 3 / 2),
    ],
)
def test_energy_score_by_hand(draws, truth, score):
    found = plain_score()(even(torch.tensor(draws, dtype=torch.float)[:, None]), even(torch.tensor([float(truth)])))
    assert found.item() == pytest.approx(score * TYPICAL, abs=1e-6)


def test_the_truth_is_the_best_sampler():
    """Of a law with two masks: expectations of the unbiased score, known in closed form."""
    p, cases, rng = 0.3, 4000, generator()

    def drawn(probability: float, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=rng) < probability).float()

    def expected(draws: Tensor) -> float:
        return plain_score()(even(draws), even(drawn(p, cases))).item() / TYPICAL

    honest = expected(drawn(p, 4, cases))
    assert honest == pytest.approx(p * (1 - p), abs=0.02)
    assert expected(torch.full((4, cases), p)) == pytest.approx(2 * p * (1 - p), abs=0.02)
    assert expected(torch.zeros(4, cases)) == pytest.approx(p, abs=0.02)
    assert expected(drawn(0.6, 4, cases)) == pytest.approx(p * 0.4 + 0.6 * (1 - p) - 0.6 * 0.4, abs=0.02)


def test_every_scale_is_heard():
    """A mask and its mirror image differ in voxels and in blocks, and not in volume."""
    truth = torch.zeros(1, 1, 32, 32)
    truth[..., :16] = 1
    drawn = truth.flip(-1).expand(2, -1, -1, -1, -1)
    expected = (math.sqrt(32**2) + math.sqrt(8**2) + math.sqrt(2**2) + 0) / 4
    assert plain_score()(drawn, truth).item() == pytest.approx(expected)


def test_scales_are_learned_in_training_only():
    score = EnergyScore(decay=0.9)
    far, near = even(torch.zeros(2, 1)), even(torch.full((2, 1), 0.5))
    truth = even(torch.ones(1))
    assert score(far, truth).item() == pytest.approx(1), "the first distance is the scale"
    first = score.typical.clone()
    assert first.tolist() == pytest.approx([16, 4, 1, 1])
    score(near, truth)
    assert score.typical.tolist() == pytest.approx((first * (0.9 + 0.1 / 2)).tolist())
    second = score.eval().typical.clone()
    assert score(far, truth).item() == pytest.approx(1 / 0.95)
    assert torch.equal(score.typical, second)
    assert torch.equal(score.state_dict()["typical"], second), "a run resumes with its scales"


def test_a_perfect_draw_has_a_finite_gradient():
    drawn = even(torch.ones(2, 1)).clone().requires_grad_()
    plain_score()(drawn, even(torch.ones(1))).backward()
    assert torch.isfinite(drawn.grad).all()


def test_levels_lie_on_the_grid_and_half_are_pure_noise():
    t = draw_levels(20_000, 10, 0.5, generator())
    assert set(t.mul(10).round(decimals=4).tolist()) == set(range(1, 11))
    assert (t == 1).float().mean().item() == pytest.approx(0.5 + 0.5 / 10, abs=0.02)
    assert (draw_levels(100, 1000, 1.0, generator()) == 1).all()
    assert (draw_levels(10_000, 1000, 0.0, generator()) == 1).float().mean() < 0.01


class Watched(nn.Module):
    """Wraps a network as DDP does, and keeps what it is called with."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.calls: list[tuple[Tensor, ...]] = []

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        self.calls.append(inputs)
        return self.module(*inputs)


OPTIONS = {"classes": 3, "scale": 0.5, "draws": 3}


def batch() -> tuple[Tensor, Tensor]:
    image = torch.randn(2, 1, 32, 16, generator=generator(1))
    return image, torch.randint(0, 3, (2, 32, 16), generator=generator(2))


def test_losses_call_the_wrapped_network_once():
    image, labels = batch()
    level = torch.tensor([0.0, 0.5])
    networks = {kind: Watched(build_network(kind, 2, 1, 3, (8, 8, 8, 8))) for kind in ("conditional", "unet")}
    conditional_loss(
        networks["conditional"], image, labels, level, generator(), **OPTIONS, mean_weight=5.0, score=EnergyScore()
    ).backward()
    unet_loss(networks["unet"], image, labels, classes=3).backward()
    networks["unconditional"] = Watched(build_network("unconditional", 2, 1, 3, (8, 8, 8, 8)))
    generation_loss(networks["unconditional"], image, level, generator()).backward()
    assert [len(network.calls) for network in networks.values()] == [1, 1, 1]


class Oracle(nn.Module):
    """Answers with the truth, from the mean head or from the draws."""

    def __init__(self, mean: Tensor, drawn: Tensor) -> None:
        super().__init__()
        self.mean, self.drawn = mean, drawn

    def forward(self, image: Tensor, x_t: Tensor, level: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean, self.drawn.expand(len(noise), *self.drawn.shape)


def test_the_truth_has_no_conditional_loss():
    image, labels = batch()
    sure, unsure = 50 * one_hot(labels, 3), torch.zeros(2, 3, 32, 16)

    def loss(mean: Tensor, drawn: Tensor) -> float:
        network, level = Oracle(mean, drawn), torch.zeros(2)
        return conditional_loss(
            network, image, labels, level, generator(), **OPTIONS, mean_weight=5.0, score=plain_score()
        ).item()

    assert loss(sure, sure) == pytest.approx(0, abs=1e-4)
    assert loss(unsure, sure) == pytest.approx(5 * math.log(3), abs=1e-4)
    assert loss(sure, unsure) > 0.1


def test_draws_share_a_noisy_mask_that_vanishes_at_pure_noise():
    image, labels = batch()
    network = Watched(build_network("conditional", 2, 1, 3, (8, 8, 8, 8)))
    level = torch.tensor([0.0, 1.0])
    conditional_loss(network, image, labels, level, generator(), **OPTIONS, mean_weight=5.0, score=EnergyScore())
    [(_, x_t, found_level, noise)] = network.calls
    assert x_t.shape == noise.shape == (3, 2, 3, 8, 4)
    assert torch.equal(found_level, level)
    assert torch.equal(x_t[0], x_t[1])
    assert not torch.equal(noise[0], noise[1])
    assert (x_t[:, 0] == 0).all()
    shares = torch.nn.functional.avg_pool2d(one_hot(labels, 3)[1], 4)
    torch.testing.assert_close(x_t[0, 1], 2 * shares - 1, atol=1e-5, rtol=0)


def test_unet_loss_of_the_truth_and_of_a_shrug():
    image, labels = batch()

    class Constant(nn.Module):
        def __init__(self, logits: Tensor) -> None:
            super().__init__()
            self.logits = logits

        def forward(self, image: Tensor) -> Tensor:
            return self.logits

    assert unet_loss(Constant(50 * one_hot(labels, 3)), image, labels, classes=3).item() == pytest.approx(0, abs=1e-4)
    n, sizes = labels.numel(), [(labels == k).sum().item() for k in (1, 2)]
    dice = sum((2 * size / 3 + 1) / (size + n / 3 + 1) for size in sizes) / 2
    shrug = unet_loss(Constant(torch.zeros(2, 3, 32, 16)), image, labels, classes=3).item()
    assert shrug == pytest.approx(math.log(3) + 1 - dice, abs=1e-4)


def test_the_perfect_velocity_has_no_loss():
    image = torch.randn(2, 1, 16, 16, generator=generator(1))

    class Perfect(nn.Module):
        def forward(self, x_t: Tensor, level: Tensor) -> Tensor:
            return velocity(image, noise_from_x0(x_t, image, level), level)

    assert generation_loss(Perfect(), image, torch.tensor([0.0, 0.7]), generator()).item() == pytest.approx(0, abs=1e-8)

    class Silent(nn.Module):
        def forward(self, x_t: Tensor, level: Tensor) -> Tensor:
            return torch.zeros_like(x_t)

    pure = generation_loss(Silent(), image, torch.zeros(2), generator()).item()
    assert pure == pytest.approx(image.square().mean().item()), "at pure noise it asks for -x_0"
