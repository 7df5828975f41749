import pytest
import torch
from torch import Tensor, nn

from medseg_diff.networks.classic_unet import ClassicDenoiser, ClassicUNet, TimestepEncoding, mirror, output_size

WIDTHS = (8, 8, 16, 16)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def denoiser(dims: int = 2, padding: str = "valid", widths: tuple[int, ...] = WIDTHS) -> ClassicDenoiser:
    torch.manual_seed(0)
    network = ClassicDenoiser(dims, 1, 3, widths, padding=padding)
    nn.init.normal_(network.unet.head.weight, 0, 0.2)
    return network


def inputs(*space: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return random(batch, 1, *space), random(batch, 3, *space, seed=1), torch.linspace(0.1, 0.9, batch)


def test_figure_1_turns_572_into_388():
    assert output_size((572, 572), 5, "valid") == (388, 388)
    with torch.device("meta"):
        assert ClassicUNet(2, 1, 2)(torch.empty(1, 1, 572, 572)).shape == (1, 2, 388, 388)


def test_figure_1_has_31_030_658_parameters():
    def convolutions(*layers: tuple[int, int, int]) -> int:
        return sum((voxels * inputs + 1) * outputs for voxels, inputs, outputs in layers)

    down = [(9, a, b) for a, b in [(1, 64), (64, 128), (128, 256), (256, 512), (512, 1024)]]
    again = [(9, a, a) for a in (64, 128, 256, 512, 1024)]
    up = [(4, 2 * a, a) for a in (512, 256, 128, 64)]
    decoder = [layer for a in (512, 256, 128, 64) for layer in [(9, 2 * a, a), (9, a, a)]]
    by_hand = convolutions(*down, *again, *up, *decoder, (1, 64, 2))
    assert by_hand == 31_030_658
    with torch.device("meta"):
        assert sum(p.numel() for p in ClassicUNet(2, 1, 2).parameters()) == by_hand


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_the_sizes_that_fit_are_those_whose_maps_are_even_and_not_used_up(levels):
    def walked(n: int) -> int:
        for _ in range(levels - 1):
            n -= 4
            if n <= 0 or n % 2:
                return 0
            n //= 2
        n -= 4
        for _ in range(levels - 1):
            n = max(2 * n - 4, 0) if n > 0 else 0
        return max(n, 0)

    for n in range(1, 150):
        if walked(n):
            assert output_size((n,), levels, "valid") == (walked(n),)
        else:
            with pytest.raises(ValueError, match=f"a side of {n}:"):
                output_size((n,), levels, "valid")


@pytest.mark.parametrize(
    ("side", "padding", "advice"),
    [
        (571, "valid", "make it 556 or 572"),
        (573, "valid", "make it 572 or 588"),
        (100, "valid", "make it 188"),
        (40, "same", "make it 32 or 48"),
        (15, "same", "make it 16"),
    ],
)
def test_a_side_that_does_not_fit_is_told_the_nearest(side, padding, advice):
    with pytest.raises(ValueError, match=f"{advice}$"):
        output_size((side,), 5, padding)
    with pytest.raises(ValueError, match=f"{advice}$"):
        ClassicUNet(2, 1, 1, (8,) * 5, padding=padding)(torch.zeros(1, 1, side, side))


@pytest.mark.parametrize("dims", [2, 3])
def test_same_padding_keeps_the_size(dims):
    assert output_size((32, 48), 5, "same") == (32, 48)
    x = random(1, 2, *(16, 24, 16)[:dims])
    assert ClassicUNet(dims, 2, 3, WIDTHS, padding="same")(x).shape == (1, 3, *x.shape[2:])


@pytest.mark.parametrize(
    ("dims", "widths", "side", "window", "offset"), [(2, (8, 8, 8), 60, 44, 4), (3, (4, 4), 22, 18, 4)]
)
def test_tiles_are_seamless(dims, widths, side, window, offset):
    """A valid output depends on its window of the input alone: a tile's output is that part of the whole's."""
    torch.manual_seed(0)
    network = ClassicUNet(dims, 1, 2, widths)
    x = random(1, 1, *(side,) * dims)
    (length,) = output_size((window,), len(widths), "valid")
    tile = network(x[..., *(slice(offset, offset + window),) * dims])
    part = network(x)[..., *(slice(offset, offset + length),) * dims]
    assert part.std() > 0
    torch.testing.assert_close(tile, part)


def test_mirroring_goes_on_where_the_margin_is_wider_than_the_image():
    x = torch.tensor([[[1.0, 2.0, 3.0]]])
    assert mirror(x, (11,)).tolist() == [[[1, 2, 3, 2, 1, 2, 3, 2, 1, 2, 3]]]
    assert mirror(x[..., :1], (4,)).tolist() == [[[1, 1, 1, 1]]]
    torch.testing.assert_close(mirror(x, (7,)), nn.functional.pad(x, (2, 2), mode="reflect"))


def test_weights_keep_the_variance_of_what_flows_through():
    """Ronneberger et al., section 3: a standard deviation of sqrt(2 / N), N the incoming nodes of one neuron."""
    torch.manual_seed(0)
    network = ClassicUNet(2, 1, 2, (64, 128, 256))
    assert network.encoder[1].conv1.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    assert network.up[0].weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.02)


def test_timesteps_are_told_by_the_sines_of_vaswani():
    encoding = TimestepEncoding(6)
    encoding.layers = nn.Identity()
    t = 250.0
    alpha_bar = torch.cos(torch.tensor([t / 1000 * torch.pi / 2], dtype=torch.float64)).float() ** 2
    angles = torch.tensor([t, t / 10000 ** (1 / 3), t / 10000 ** (2 / 3)])
    torch.testing.assert_close(encoding(alpha_bar)[0], torch.cat([angles.sin(), angles.cos()]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize(("dims", "widths"), [(2, WIDTHS), (2, (8,) * 5), (3, (8, 8))])
def test_a_denoiser_answers_in_the_images_own_size(dims, widths, padding):
    image, x_t, alpha_bar = inputs(*(16, 32, 16)[:dims], batch=1)
    with torch.no_grad():
        output, logits = denoiser(dims, padding, widths)(image, x_t, alpha_bar)
    assert output.shape == x_t.shape
    assert logits is None


def test_far_from_the_border_padding_makes_no_difference():
    """Mirrored, cropped and in place: the margin of two levels is eight voxels a side."""
    valid, same = (denoiser(padding=padding, widths=(8, 8)) for padding in ("valid", "same"))
    state = inputs(22, 26)
    centre = ..., slice(9, 13), slice(9, 17)
    torch.testing.assert_close(valid(*state)[0][centre], same(*state)[0][centre], atol=1e-4, rtol=0)


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_a_gradient_reaches_every_parameter(padding):
    network = denoiser(padding=padding)
    network(*inputs(16, 24))[0].square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_image_and_noise_and_level_all_matter():
    network = denoiser(padding="same")
    image, x_t, alpha_bar = inputs(16, 24)
    first, _ = network(image, x_t, alpha_bar)
    for changed in ((image.flip(0), x_t, alpha_bar), (image, x_t.flip(0), alpha_bar), (image, x_t, alpha_bar.flip(0))):
        assert not torch.allclose(network(*changed)[0], first, atol=1e-3)


def test_an_item_does_not_depend_on_its_company():
    network = denoiser(padding="same")
    image, x_t, alpha_bar = inputs(16, 24)
    together, _ = network(image, x_t, alpha_bar)
    for item in range(2):
        one = slice(item, item + 1)
        alone = network.denoise(network.encode(image[one]), x_t[one], alpha_bar[one])
        torch.testing.assert_close(alone, together[one], atol=1e-4, rtol=0)


def test_an_untrained_denoiser_is_silent():
    assert not ClassicDenoiser(2, 1, 3, WIDTHS, padding="same")(*inputs(16, 16))[0].any()
