import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from medseg_diff.config import MASK_DENOISERS
from medseg_diff.diffusion.fields import COARSE, SPACINGS, cells, smooth
from medseg_diff.networks import build_generator, build_network
from medseg_diff.networks.blocks import LevelEmbedding, UNet
from medseg_diff.networks.conditional import SHARED, STRIDE, ConditionalNet

FOUR, FIVE = (8, 8, 16, 16), (8, 8, 16, 16, 24)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def awakened(network: nn.Module) -> nn.Module:
    """Layers that start at zero hide every gradient before them."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.2, generator=generator)
    return network


def conditional(dims: int = 2, classes: int = 3, widths: tuple[int, ...] = FOUR) -> ConditionalNet:
    torch.manual_seed(0)
    return awakened(build_network("conditional", dims, 1, classes, widths, size=(16,) * dims))


def inputs(dims: int, classes: int, batch: int = 2, draws: int = 3) -> tuple[Tensor, ...]:
    """Image, a noisy mask for every draw, the level, and the noise of the draws."""
    space, shape = (16, 32, 16)[:dims], (draws, batch, classes)
    coarse, half = ([n // factor for n in space] for factor in (STRIDE, COARSE))
    x_t, shared = random(*shape, *coarse, seed=1), random(*shape, SHARED, seed=2)
    fields = random(*shape, len(SPACINGS), *half, seed=3)
    return random(batch, 1, *space), x_t, torch.linspace(0, 0.9, batch), shared, fields


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("widths", [FOUR, FIVE])
@pytest.mark.parametrize("classes", [2, 5])
def test_a_draw_covers_the_image_class_by_class(dims, widths, classes):
    network = conditional(dims, classes, widths)
    image, *noise = inputs(dims, classes)
    mean, drawn = network(image), network(image, *noise)
    assert mean.shape == (2, classes, *image.shape[2:])
    assert drawn.shape == (3, 2, classes, *image.shape[2:])


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("widths", [FOUR, FIVE])
def test_other_kinds_keep_the_size(dims, widths):
    image, level = random(2, 3, *(16,) * dims), torch.tensor([0.0, 1.0])
    assert build_network("unet", dims, 3, 4, widths, size=(16,) * dims)(image).shape == (2, 4, *(16,) * dims)
    for kind in ("unconditional", "classic_unet"):
        assert build_generator(kind, dims, 3, 6, widths)(image, level).shape == (2, 6, *(16,) * dims)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("widths", [FOUR, FIVE])
@pytest.mark.parametrize("kind", MASK_DENOISERS)
def test_denoisers_of_masks_answer_class_by_class(kind, dims, widths):
    image, x_t, level = random(2, 3, *(32,) * dims), random(2, 4, *(32,) * dims), torch.tensor([0.0, 1.0])
    network = awakened(build_network(kind, dims, 3, 4, widths, size=(16,) * dims))
    output, condition = network(image, x_t, level)
    assert output.shape == x_t.shape
    assert (condition is not None) == (kind == "medsegdiff_v2")
    torch.testing.assert_close(network.denoise(network.encode(image), x_t, level), output)


def test_an_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match="transformer"):
        build_network("transformer", 2, 1, 2, FOUR, size=(16, 16))
    with pytest.raises(ValueError, match="unet"):
        build_generator("unet", 2, 1, 1, FOUR)


@pytest.mark.parametrize("dims", [2, 3])
def test_features_come_finest_first(dims):
    features = UNet(dims, 1, FIVE)(random(1, 1, *(32,) * dims))
    assert [tuple(f.shape[1:3]) for f in features] == [(8, 32), (8, 16), (16, 8), (16, 4), (24, 2)]


def losses() -> dict[str, tuple[nn.Module, Callable[[nn.Module], Tensor]]]:
    image, x_t, level, *noise = inputs(2, 3)
    return {
        "conditional": (
            conditional(),
            lambda net: net(image).square().mean() + net(image, x_t, level, *noise).square().mean(),
        ),
        "unet": (build_network("unet", 2, 1, 3, FIVE, size=(32, 32)), lambda net: net(image).square().mean()),
        "unconditional": (
            build_generator("unconditional", 2, 1, 1, FOUR),
            lambda net: net(image, level).square().mean(),
        ),
    }


@pytest.mark.parametrize("kind", ["conditional", "unet", "unconditional"])
def test_a_gradient_reaches_every_parameter(kind):
    network, loss = losses()[kind]
    loss(awakened(network)).backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


@pytest.fixture(scope="module")
def pure() -> tuple[Tensor, Tensor]:
    """Of a network of random weights: the mean head's logits for a few small images, and 4000 draws at pure noise."""
    network, batch, draws, side = conditional(), 8, 4000, 8
    white = [random(draws, batch, 3, *[len(cells(0, side, n))] * 2, seed=n) for n in SPACINGS]
    fields = torch.stack([smooth(w, (0, 0), (side, side), n) for w, n in zip(white, SPACINGS, strict=True)], 3)
    x_t, shared = torch.zeros(1, batch, 3, *[side // STRIDE] * 2), random(draws, batch, 3, SHARED, seed=1)
    with torch.no_grad():
        image = 3 * random(batch, 1, side, side)
        return network(image), network(image, x_t, torch.zeros(batch), shared, fields)


def shares(drawn: Tensor) -> Tensor:
    """Of the draws that have each label, [batch, classes, *space]."""
    return functional.one_hot(drawn.argmax(2), drawn.shape[2]).movedim(-1, 2).float().mean(0)


def test_a_voxel_is_drawn_with_the_mean_heads_probabilities(pure):
    """Exactly, whatever the weights: what remains is the error of counting, here against four standard deviations."""
    mean, drawn = pure
    p = mean.softmax(1)
    assert p.std() > 0.1, "probabilities that differ"
    assert p.min() < 0.01, "and rare labels among them"
    errors = (shares(drawn) - p) / (p * (1 - p) / len(drawn)).sqrt().clamp_min(1e-4)
    assert errors.abs().max() < 5
    assert errors.mean().abs() < 0.1


def test_the_noise_of_a_voxel_is_gumbels(pure):
    """Its weights have unit norm, so mean and variance are Gumbel's; the logits of draws are sharper by one factor."""
    mean, drawn = pure
    sharpness = torch.cov(torch.stack([mean.flatten(), drawn.mean(0).flatten()]))[0, 1] / mean.var()
    noise = drawn / sharpness - mean
    assert noise.mean(0).sub(0.5772).abs().max() < 0.1
    assert noise.var(0).sub(math.pi**2 / 6).abs().max() < 0.3
    assert noise.var(0).mean().item() == pytest.approx(math.pi**2 / 6, rel=0.02)


def test_the_shift_is_silent_at_pure_noise():
    network = conditional()
    image, x_t, _, shared, fields = inputs(2, 3)
    level = torch.tensor([0.0, 0.5])
    before = network(image, x_t, level, shared, fields)
    with torch.no_grad():
        network.denoiser.shift.weight += 1
    after = network(image, x_t, level, shared, fields)
    assert torch.equal(after[:, 0], before[:, 0])
    assert not torch.allclose(after[:, 1], before[:, 1], atol=1e-2)


@pytest.mark.parametrize("dims", [2, 3])
def test_one_noisy_mask_serves_all_draws(dims):
    network = conditional(dims)
    image, x_t, *noise = inputs(dims, 3)
    one = network(image, x_t[:1], *noise)
    repeated = network(image, x_t[:1].expand_as(x_t), *noise)
    torch.testing.assert_close(one, repeated, atol=1e-3, rtol=1e-4)


def test_what_the_encoder_computes_serves_every_noise():
    """The draws of `forward` are those of a denoiser given features that were encoded once, without x_t."""
    network = conditional()
    image, x_t, *noise = inputs(2, 3)
    features = network.encode(image)
    for state in (x_t, x_t + 1):
        drawn = network(image, state, *noise)
        assert torch.equal(network(image), features.mean_logits)
        assert torch.equal(drawn, network.denoiser(features, state, *noise))
    assert not torch.equal(drawn, network.denoiser(features, x_t, *noise)), "x_t has no effect"


@pytest.mark.parametrize("dims", [2, 3])
def test_a_draw_does_not_depend_on_its_company(dims):
    network = conditional(dims)
    image, x_t, level, *noise = inputs(dims, 3)
    together = network(image, x_t, level, *noise)
    for draw in range(3):
        for item in range(2):
            one = slice(item, item + 1)
            state, shared, fields = (x[draw, None, one] for x in (x_t, *noise))
            alone = network(image[one], state, level[one], shared, fields)
            torch.testing.assert_close(alone[0, 0], together[draw, item], atol=1e-3, rtol=0)


def test_noise_and_state_and_level_all_matter():
    network = conditional()
    image, *given = inputs(2, 3)
    first = network(image, *given)
    for index in range(len(given)):
        changed = [x.flip(0) if i == index else x for i, x in enumerate(given)]
        assert not torch.allclose(network(image, *changed), first, atol=1e-3)


def taught(network: ConditionalNet) -> set[str]:
    """The parts that the last backward pass reached."""
    return {name.split(".")[0] for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}


def test_the_draws_teach_the_denoiser_alone():
    network = conditional()
    network(*inputs(2, 3)).square().mean().backward()
    assert taught(network) == {"denoiser"}


def test_the_mean_head_and_its_encoder_are_taught_without_draws():
    network = conditional()
    network(inputs(2, 3)[0]).square().mean().backward()
    assert taught(network) == {"encoder", "mean_head"}


def test_level_embedding_tells_all_levels_apart():
    torch.manual_seed(0)
    embedded = LevelEmbedding(16)(torch.cos(torch.linspace(0, torch.pi / 2, 50)) ** 2)
    distance = torch.cdist(embedded, embedded) + torch.eye(50)
    assert torch.isfinite(embedded).all()
    assert distance.min() > 1e-3
