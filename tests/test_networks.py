from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from medseg_diff.config import MASK_DENOISERS
from medseg_diff.networks import build_generator, build_network
from medseg_diff.networks.blocks import LevelEmbedding, UNet
from medseg_diff.networks.conditional import STRIDE, ConditionalNet

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


def inputs(dims: int, classes: int, batch: int = 2, draws: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    space = (16, 32, 16)[:dims]
    coarse = [n // STRIDE for n in space]
    level = torch.linspace(0, 0.9, batch)
    shape = draws, batch, classes, *coarse
    return random(batch, 1, *space), random(*shape, seed=1), level, random(*shape, seed=2)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("widths", [FOUR, FIVE])
@pytest.mark.parametrize("classes", [2, 5])
def test_a_draw_covers_the_image_class_by_class(dims, widths, classes):
    network = conditional(dims, classes, widths)
    image, x_t, level, noise = inputs(dims, classes)
    mean, drawn = network(image, x_t, level, noise)
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
    image, x_t, level, noise = inputs(2, 3)
    return {
        "conditional": (conditional(), lambda net: sum(o.square().mean() for o in net(image, x_t, level, noise))),
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


def test_an_untrained_draw_is_the_mean_heads_answer():
    torch.manual_seed(0)
    mean, drawn = build_network("conditional", 2, 1, 3, FOUR, size=(16, 32))(*inputs(2, 3))
    assert torch.equal(drawn, mean.expand_as(drawn))


def test_what_the_encoder_computes_serves_every_noise():
    """The draws of `forward` are those of a denoiser given features that were encoded once, without x_t."""
    network = conditional()
    image, x_t, level, noise = inputs(2, 3)
    features = network.encode(image)
    for state in (x_t, x_t + 1):
        mean, drawn = network(image, state, level, noise)
        assert torch.equal(mean, features.mean_logits)
        assert torch.equal(drawn, network.denoiser(features, state, level, noise))
    assert not torch.equal(drawn, network.denoiser(features, x_t, level, noise)), "x_t has no effect"


@pytest.mark.parametrize("dims", [2, 3])
def test_a_draw_does_not_depend_on_its_company(dims):
    network = conditional(dims)
    image, x_t, level, noise = inputs(dims, 3)
    _, together = network(image, x_t, level, noise)
    for draw in range(3):
        for item in range(2):
            one = slice(item, item + 1)
            _, alone = network(image[one], x_t[draw, None, one], level[one], noise[draw, None, one])
            torch.testing.assert_close(alone[0, 0], together[draw, item], atol=1e-3, rtol=0)


def test_noise_and_state_and_level_all_matter():
    network = conditional()
    image, x_t, level, noise = inputs(2, 3)
    _, first = network(image, x_t, level, noise)
    for changed in ((x_t.flip(0), level, noise), (x_t, level.flip(0), noise), (x_t, level, noise.flip(0))):
        assert not torch.allclose(network(image, *changed)[1], first, atol=1e-3)


def test_the_denoiser_teaches_the_encoder_but_not_the_mean_head():
    network = conditional()
    _, drawn = network(*inputs(2, 3))
    drawn.square().mean().backward()
    assert all(p.grad is None for p in network.mean_head.parameters())
    assert all(p.grad is not None and p.grad.any() for p in network.encoder.parameters())


def test_the_mean_head_teaches_the_encoder_but_not_the_denoiser():
    network = conditional()
    mean, _ = network(*inputs(2, 3))
    mean.square().mean().backward()
    assert all(p.grad is None for p in network.denoiser.parameters())
    assert all(p.grad is not None and p.grad.any() for p in network.encoder.parameters())


def test_level_embedding_tells_all_levels_apart():
    torch.manual_seed(0)
    embedded = LevelEmbedding(16)(torch.cos(torch.linspace(0, torch.pi / 2, 50)) ** 2)
    distance = torch.cdist(embedded, embedded) + torch.eye(50)
    assert torch.isfinite(embedded).all()
    assert distance.min() > 1e-3
