import math

import pytest
import torch
from torch import Tensor, nn

from medseg_diff.diffusion.fields import COARSE, SPACINGS
from medseg_diff.diffusion.losses import loss_weight, variational_term
from medseg_diff.diffusion.masks import IGNORED, one_hot
from medseg_diff.diffusion.process import add_noise, target, velocity, x0_from
from medseg_diff.networks import build_generator, build_network
from medseg_diff.networks.conditional import SHARED, STRIDE
from medseg_diff.training.batch import draw_times
from medseg_diff.training.objective import (
    BLOCKS,
    VolumeScore,
    class_weights,
    denoiser_loss,
    dice_loss,
    generation_loss,
    hard,
    mask_loss,
    mean_head_loss,
    unet_loss,
    weighted_cross_entropy,
)

SIDE = 16


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain_score(classes: int = 1) -> VolumeScore:
    """Without the running scales."""
    score = VolumeScore(classes).eval()
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
def test_the_score_by_hand(draws, truth, score):
    found = plain_score()(even(torch.tensor(draws, dtype=torch.float)[:, None]), even(torch.tensor([float(truth)])))
    assert found.item() == pytest.approx(score, abs=1e-6)


def test_the_truth_is_the_best_sampler():
    """Of a law with two masks: expectations of the unbiased score, known in closed form."""
    p, cases, rng = 0.3, 4000, generator()

    def drawn(probability: float, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=rng) < probability).float()

    def expected(draws: Tensor) -> float:
        return plain_score()(even(draws), even(drawn(p, cases))).item()

    honest = expected(drawn(p, 4, cases))
    assert honest == pytest.approx(p * (1 - p), abs=0.02)
    assert expected(torch.full((4, cases), p)) == pytest.approx(2 * p * (1 - p), abs=0.02)
    assert expected(torch.zeros(4, cases)) == pytest.approx(p, abs=0.02)
    assert expected(drawn(0.6, 4, cases)) == pytest.approx(p * 0.4 + 0.6 * (1 - p) - 0.6 * 0.4, abs=0.02)


def test_voxels_that_belong_together_are_drawn_together():
    """Of coins with the same chance everywhere, one a mask or one a voxel: each law is told best by itself."""
    rng = generator(4)

    def coins(n: int, together: bool) -> Tensor:
        shape = (n, 1, 1, 1) if together else (n, 1, SIDE, SIDE)
        return (torch.rand(shape, generator=rng) < 0.5).float().expand(n, 1, SIDE, SIDE)

    def expected(drawn_together: bool, true_together: bool, n: int = 1500) -> float:
        draws = torch.stack([coins(n, drawn_together) for _ in range(3)])
        return plain_score()(draws, coins(n, true_together)).item()

    assert expected(True, True) < expected(False, True) - 0.05
    assert expected(False, False) < expected(True, False) - 0.05


def test_every_size_of_block_is_heard():
    """A mask and its mirror image differ in every block of up to 16, and not in volume."""
    truth = torch.zeros(1, 1, 32, 32)
    truth[..., :16] = 1
    drawn = truth.flip(-1).expand(2, -1, -1, -1, -1)
    assert plain_score()(drawn, truth).item() == pytest.approx(len(BLOCKS) / (len(BLOCKS) + 1))


def test_classes_are_scored_one_by_one():
    right, wrong = torch.ones(1, 1, SIDE, SIDE), torch.zeros(1, 1, SIDE, SIDE)

    def score(*drawn: Tensor) -> float:
        twice = torch.cat(drawn, 1).expand(2, 1, 2, SIDE, SIDE)
        return plain_score(2)(twice, torch.cat([right, right], 1)).item()

    assert score(wrong, right) == score(right, wrong) == pytest.approx(1 / 2)
    assert score(wrong, wrong) == pytest.approx(1)


def test_a_rare_class_is_heard_as_loudly_as_a_common_one():
    """Each is divided by its own distance, which is typical of it."""
    truth, score = torch.zeros(1, 2, SIDE, SIDE), VolumeScore(2)
    drawn = truth.repeat(2, 1, 1, 1, 1)
    drawn[:, :, 0, :8], drawn[:, :, 1, 0, 0] = 1, 1
    score(drawn, truth)
    assert (score.typical[:, 0] > 2 * score.typical[:, 1]).all()
    for k in (0, 1):
        alone = drawn.clone()
        alone[:, :, 1 - k] = 0
        assert score.eval()(alone, truth).item() == pytest.approx(1 / 2, rel=1e-4)


def test_scales_are_learned_in_training_only():
    score = VolumeScore(1, decay=0.9)
    far, near = even(torch.zeros(2, 1)), even(torch.full((2, 1), 0.5))
    truth = even(torch.full((1,), 0.8))
    assert score(far, truth).item() == pytest.approx(1), "the first distance is the scale"
    first = score.typical.clone()
    torch.testing.assert_close(first, torch.full((len(BLOCKS) + 1, 1), 0.8))
    score(near, truth)
    torch.testing.assert_close(score.typical, first * 0.9 + 0.1 * 0.3)
    second = score.eval().typical.clone()
    assert score(far, truth).item() == pytest.approx(0.8 / 0.75)
    assert torch.equal(score.typical, second)
    assert torch.equal(score.state_dict()["typical"], second), "a run resumes with its scales"


def test_drawn_masks_are_hard_and_their_gradient_is_soft():
    logits = torch.tensor([[[[2.0, -1.0]], [[1.0, 3.0]]]])[:, None].requires_grad_()
    found = hard(logits)
    torch.testing.assert_close(found.detach()[0, 0, :, 0], torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    weight = torch.tensor([[[[0.3, -2.0]], [[1.0, 0.7]]]])[:, None]
    gradient = torch.autograd.grad((weight * found).sum(), logits)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad((weight * logits.softmax(2)).sum(), logits)[0])


def test_a_perfect_draw_has_a_finite_gradient():
    drawn = even(torch.ones(2, 1)).clone().requires_grad_()
    plain_score()(drawn, even(torch.ones(1))).backward()
    assert torch.isfinite(drawn.grad).all()


def test_levels_lie_on_the_grid_and_half_are_pure_noise():
    t = draw_times(20_000, 10, 0.5, generator())
    assert set(t.mul(10).round(decimals=4).tolist()) == set(range(1, 11))
    assert (t == 1).float().mean().item() == pytest.approx(0.5 + 0.5 / 10, abs=0.02)
    assert (draw_times(100, 1000, 1.0, generator()) == 1).all()
    assert (draw_times(10_000, 1000, 0.0, generator()) == 1).float().mean() < 0.01


class Watched(nn.Module):
    """Wraps a network as DDP does, and keeps what it is called with."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.calls: list[tuple[Tensor, ...]] = []

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        self.calls.append(inputs)
        return self.module(*inputs)


class Constant(nn.Module):
    """Says the same whatever it is asked."""

    def __init__(self, output: Tensor | tuple[Tensor, ...]) -> None:
        super().__init__()
        self.output = output

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.output


OPTIONS = {"classes": 3, "scale": 0.5}
PREDICTED = {"prediction": "velocity", "weighting": "uniform"}


def noises() -> tuple[Tensor, Tensor, Tensor]:
    """Of x_t; shared numbers and fields of three draws."""
    coarse, half = ((32 // factor, 16 // factor) for factor in (STRIDE, COARSE))
    shapes = (2, 3, *coarse), (2, 3, 3, SHARED), (2, 3, 3, len(SPACINGS), *half)
    x, shared, fields = (torch.randn(shape, generator=generator(seed)) for seed, shape in enumerate(shapes, start=3))
    return x, shared, fields


def batch() -> tuple[Tensor, Tensor]:
    image = torch.randn(2, 1, 32, 16, generator=generator(1))
    return image, torch.randint(0, 3, (2, 32, 16), generator=generator(2))


def test_losses_call_the_wrapped_network_once():
    image, labels = batch()
    level = torch.tensor([0.0, 0.5])
    networks = {
        kind: Watched(build_network(kind, 2, 1, 3, (8, 8, 8, 8), size=(32, 16))) for kind in ("conditional", "unet")
    }
    mean_head_loss(networks["conditional"], image, labels, torch.ones(3)).backward()
    networks["draws"] = Watched(networks["conditional"].module)
    denoiser_loss(networks["draws"], image, labels, level, *noises(), **OPTIONS, score=VolumeScore(3)).backward()
    unet_loss(networks["unet"], image, labels, classes=3).backward()
    networks["unconditional"] = Watched(build_generator("unconditional", 2, 1, 1, (8, 8, 8, 8)))
    generation_loss(networks["unconditional"], image, level, torch.randn_like(image), **PREDICTED).backward()
    networks["v2"] = Watched(build_network("medsegdiff_v2", 2, 1, 3, (8, 8, 8, 8), size=(32, 16)))
    noise = torch.randn(2, 3, 32, 16, generator=generator(3))
    mask_loss(networks["v2"], image, labels, level, noise, **OPTIONS, **PREDICTED, teach_condition=True).backward()
    assert [len(network.calls) for network in networks.values()] == [1, 1, 1, 1, 1]


def test_the_truth_has_no_loss():
    image, labels = batch()
    sure, unsure = 50 * one_hot(labels, 3), torch.zeros(2, 3, 32, 16)

    def of_mean(logits: Tensor, weight: tuple[float, ...] = (1, 1, 1)) -> float:
        return mean_head_loss(Constant(logits), image, labels, torch.tensor(weight, dtype=torch.float)).item()

    def of_draws(logits: Tensor) -> float:
        network, level = Constant(logits.expand(3, *logits.shape)), torch.zeros(2)
        return denoiser_loss(network, image, labels, level, *noises(), **OPTIONS, score=plain_score(3)).item()

    assert of_mean(sure) == pytest.approx(0, abs=1e-4)
    assert of_mean(unsure) == pytest.approx(math.log(3), abs=1e-4)
    assert of_draws(sure) == pytest.approx(0, abs=1e-4)
    assert of_draws(unsure) > 0.1
    shares = torch.bincount(labels.flatten(), minlength=3) / labels.numel()
    heard = sum(w * math.log(4 / w) * share for w, share in zip((1, 1, 2), shares.tolist(), strict=True))
    assert of_mean(unsure, (1, 1, 2)) == pytest.approx(heard, abs=1e-4)


def test_weighted_cross_entropy_is_least_at_the_true_probabilities():
    """Ten voxels with labels in the proportions of p, and one answer for all of them."""
    p, weight = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.4, 1.0, 3.0])
    labels = torch.tensor([[0] * 7 + [1] * 2 + [2]])

    def loss(logits: Tensor) -> Tensor:
        return weighted_cross_entropy(logits.reshape(1, 3, 1).expand(1, 3, 10), labels, weight)

    honest = p.log().requires_grad_()
    gradient = torch.autograd.grad(loss(honest), honest)[0]
    torch.testing.assert_close(gradient, torch.zeros(3), atol=1e-6, rtol=0)
    for k in range(3):
        for step in (-0.3, 0.3):
            assert loss(p.log() + step * torch.eye(3)[k]) > loss(honest) + 1e-3


def test_equal_weights_are_plain_cross_entropy():
    _, labels = batch()
    logits = torch.randn(2, 3, 32, 16, generator=generator())
    found = weighted_cross_entropy(logits, labels, torch.ones(3))
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(logits, labels))


def test_a_class_weighs_by_the_root_of_its_rarity():
    frequency = torch.tensor([0.64, 0.32, 0.04])
    weight = class_weights(frequency)
    assert (weight * frequency).sum().item() == pytest.approx(1)
    assert (weight[2] / weight[0]).item() == pytest.approx(4)
    torch.testing.assert_close(class_weights(torch.full((4,), 0.25)), torch.ones(4))
    assert torch.isfinite(class_weights(torch.tensor([1.0, 0.0]))).all()


def test_draws_share_a_noisy_mask_that_vanishes_at_pure_noise():
    image, labels = batch()
    network = Watched(build_network("conditional", 2, 1, 3, (8, 8, 8, 8), size=(32, 16)))
    level = torch.tensor([0.0, 1.0])
    noise = noises()
    denoiser_loss(network, image, labels, level, *noise, **OPTIONS, score=VolumeScore(3))
    [(_, x_t, found_level, *of_draws)] = network.calls
    assert x_t.shape == (1, 2, 3, 8, 4)
    assert torch.equal(found_level, level)
    for found, given in zip(of_draws, noise[1:], strict=True):
        assert torch.equal(found, given.movedim(1, 0))
    assert (x_t[:, 0] == 0).all()
    shares = torch.nn.functional.avg_pool2d(one_hot(labels, 3)[1], 4)
    torch.testing.assert_close(x_t[0, 1], 2 * shares - 1, atol=1e-5, rtol=0)


def test_unet_loss_of_the_truth_and_of_a_shrug():
    image, labels = batch()

    assert unet_loss(Constant(50 * one_hot(labels, 3)), image, labels, classes=3).item() == pytest.approx(0, abs=1e-4)
    n, sizes = labels.numel(), [(labels == k).sum().item() for k in (1, 2)]
    dice = sum((2 * size / 3 + 1) / (size + n / 3 + 1) for size in sizes) / 2
    shrug = unet_loss(Constant(torch.zeros(2, 3, 32, 16)), image, labels, classes=3).item()
    assert shrug == pytest.approx(math.log(3) + 1 - dice, abs=1e-4)


@pytest.mark.parametrize("prediction", ["velocity", "x0", "noise"])
@pytest.mark.parametrize("weighting", ["uniform", "min_snr", "level"])
def test_a_perfect_prediction_has_no_loss_and_silence_that_of_its_target(prediction, weighting):
    image, noise = (torch.randn(2, 1, 16, 16, generator=generator(seed)) for seed in (1, 2))
    level = torch.tensor([0.3, 0.7])
    wanted = target(prediction, image, noise, level)

    def loss(output: Tensor) -> float:
        network = Constant(output)
        return generation_loss(network, image, level, noise, prediction=prediction, weighting=weighting).item()

    assert loss(wanted) == pytest.approx(0, abs=1e-8)
    weights = loss_weight(weighting, prediction, level)
    expected = (weights * wanted.square().mean((1, 2, 3))).mean().item()
    assert loss(torch.zeros_like(wanted)) == pytest.approx(expected, rel=1e-5)


def test_masks_are_denoised_at_unit_variance_and_the_condition_is_taught_on_demand():
    image, labels = batch()
    level, noise = torch.tensor([0.0, 0.5]), torch.randn(2, 3, 32, 16, generator=generator(3))
    x_0 = 2 * 0.5 * one_hot(labels, 3) - 0.5

    class Taught(nn.Module):
        def forward(self, image: Tensor, x_t: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
            self.seen = x_t
            return velocity(x_0, noise, torch.tensor([0.0, 0.5])), torch.zeros(2, 3, 32, 16)

    network = Taught()
    assert mask_loss(network, image, labels, level, noise, **OPTIONS, **PREDICTED).item() == pytest.approx(0, abs=1e-8)
    torch.testing.assert_close(network.seen[0], noise[0])
    torch.testing.assert_close(network.seen[1], (math.sqrt(0.5) * (x_0 + noise) / math.sqrt(0.5 * 0.25 + 0.5))[1])
    found = mask_loss(network, image, labels, level, noise, **OPTIONS, **PREDICTED, teach_condition=True).item()
    flat = torch.zeros(2, 3, 32, 16)
    assert found == pytest.approx(dice_loss(flat, one_hot(labels, 3)).item() + 10 * math.log(3), rel=1e-5)


def test_the_bound_teaches_the_variance_and_not_the_estimate():
    image, noise = (torch.randn(2, 1, 16, 16, generator=generator(seed)) for seed in (1, 2))
    level, cleaner = torch.tensor([0.5, 0.9]), torch.tensor([0.52, 0.91])
    output = torch.randn(2, 2, 16, 16, generator=generator(4)).requires_grad_()

    def gradient(**options: Tensor) -> Tensor:
        network = Constant(output if options else output[:, :1])
        loss = generation_loss(network, image, level, noise, **PREDICTED, **options)
        return torch.autograd.grad(loss, output)[0]

    plain, learned = gradient(), gradient(cleaner=cleaner)
    torch.testing.assert_close(learned[:, :1], plain[:, :1])
    assert (learned[:, 1:] != 0).any()
    assert (plain[:, 1:] == 0).all()


@pytest.mark.parametrize("prediction", ["velocity", "x0", "noise"])
@pytest.mark.parametrize("train_steps", [40, 4000])
def test_squared_error_and_bound_by_number(prediction, train_steps):
    """L_simple + 0.001 L_vlb: the mean term of a random step, times the number of steps (Nichol & Dhariwal, eq. 16)."""
    x_0, noise, output, logits = (torch.randn(2, 1, 8, 8, generator=generator(seed)) for seed in (1, 2, 4, 5))
    level, cleaner = torch.tensor([0.5, 0.9]), torch.tensor([0.52, 0.95])
    found = generation_loss(
        Constant(torch.cat([output, logits], 1)), x_0, level, noise,
        prediction=prediction, weighting="uniform", cleaner=cleaner, train_steps=train_steps,
    )  # fmt: skip
    x_t = add_noise(x_0, noise, level)
    estimate = x0_from(prediction, x_t, output, level)
    bound = variational_term(x_0, x_t, estimate, logits.sigmoid(), level, cleaner).mean()
    error = (output - target(prediction, x_0, noise, level)).square().mean()
    assert found.item() == pytest.approx(error.item() + bound.item() * train_steps / 1000, rel=1e-5)


@pytest.mark.parametrize(
    ("prediction", "weights"),
    [("x0", [1 / 4 + 4, 4 + 4]), ("velocity", [0.2 + 0.8 * 4, 0.8 + 0.2 * 4]), ("noise", [1 + 4 * 4, 1 + 4 / 4])],
)
def test_the_level_weight_of_a_mask_knows_its_scale(prediction, weights):
    """SNR + 1 / 0.5^2 on the error of x_0, at SNR 1/4 and 4; on the other errors divided by their multiple of it."""
    image, labels = batch()
    level, noise = torch.tensor([0.2, 0.8]), torch.randn(2, 3, 32, 16, generator=generator(3))
    output = torch.randn(2, 3, 32, 16, generator=generator(4))

    class Silent(nn.Module):
        def forward(self, *inputs: Tensor) -> tuple[Tensor, None]:
            return output, None

    found = mask_loss(Silent(), image, labels, level, noise, **OPTIONS, prediction=prediction, weighting="level")
    errors = (output - target(prediction, one_hot(labels, 3) - 0.5, noise, level)).square().mean((1, 2, 3))
    assert found.item() == pytest.approx((torch.tensor(weights) * errors).mean().item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["mean_head", "denoiser", "unet", "medsegdiff_v2"])
def test_nothing_is_learned_where_the_class_is_not_known(kind):
    """Whatever the network says there, the loss stays, and no gradient comes from there."""
    labels = torch.randint(0, 3, (2, SIDE, SIDE), generator=generator())
    ignored = torch.zeros_like(labels, dtype=torch.bool)
    ignored[:, :8] = True
    labels[ignored] = IGNORED
    alpha_bar = torch.tensor([0.5, 0.2], dtype=torch.float64)
    logits = torch.randn(2, 3, SIDE, SIDE, generator=generator(1)).requires_grad_()
    noise = torch.randn(2, 3, SIDE, SIDE, generator=generator(2))

    def loss(given: Tensor) -> Tensor:
        image, coarse = torch.zeros(2, 1, SIDE, SIDE), noise[..., ::STRIDE, ::STRIDE]
        match kind:
            case "unet":
                return unet_loss(Constant(given), image, labels, classes=3)
            case "mean_head":
                return mean_head_loss(Constant(given), image, labels, torch.tensor([0.5, 1.0, 2.0]))
            case "denoiser":
                drawn = torch.stack([given, given.flip(1)])
                shared, fields = torch.zeros(2, 2, 3, SHARED), torch.zeros(2, 2, 3, len(SPACINGS), 8, 8)
                return denoiser_loss(
                    Constant(drawn), image, labels, alpha_bar, coarse, shared, fields, classes=3, scale=0.5,
                    score=plain_score(3),
                )  # fmt: skip
        return mask_loss(
            Constant((given, given)), image, labels, alpha_bar, noise, classes=3, scale=0.5, prediction="x0",
            weighting="uniform", teach_condition=True,
        )  # fmt: skip

    (gradient,) = torch.autograd.grad(loss(logits), logits)
    elsewhere = ignored[:, None].expand_as(logits)
    assert not gradient[elsewhere].any()
    assert gradient[~elsewhere].any()
    other = torch.where(elsewhere, logits.detach() * 9 + 1, logits.detach())
    assert loss(other).item() == pytest.approx(loss(logits).item(), rel=1e-6)
    labels.fill_(IGNORED)
    assert loss(logits).isfinite()
