import pytest
import torch
from torch import Tensor, nn

from medseg_diff.networks.blocks import from_spectrum, spectrum
from medseg_diff.networks.medsegdiff_v1 import FFParser, MedSegDiffV1, attentive_fusion

FOUR, FIVE = (8, 8, 16, 16), (8, 8, 16, 16, 24)
SIZE = (16, 32, 16)
KINDS = {"v1": lambda dims, classes, widths: MedSegDiffV1(dims, 1, classes, widths, SIZE[:dims])}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(kind: str, dims: int = 2, classes: int = 3, widths: tuple[int, ...] = FOUR) -> nn.Module:
    """Layers that start at zero would hide what lies before them: they are given a voice."""
    torch.manual_seed(0)
    built = KINDS[kind](dims, classes, widths)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in built.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.2, generator=generator)
    return built


def inputs(dims: int = 2, classes: int = 3, space: tuple[int, ...] = SIZE, batch: int = 2) -> tuple[Tensor, ...]:
    image, x_t = random(batch, 1, *space[:dims]), random(batch, classes, *space[:dims], seed=1)
    return image, x_t, torch.linspace(0, 0.9, batch)


def checkerboard(*space: int) -> Tensor:
    return 1 - 2.0 * (sum(torch.meshgrid(*(torch.arange(n) for n in space), indexing="ij")) % 2)[None, None]


def low_pass(parser: FFParser, cutoff: float) -> FFParser:
    """Nothing passes above this many cycles a voxel."""
    *full, half = (torch.fft.fftfreq(n) for n in parser.size[:-1]), torch.fft.rfftfreq(parser.size[-1])
    radius = torch.stack(torch.meshgrid(*full[0], half, indexing="ij")).norm(dim=0)
    with torch.no_grad():
        parser.weight *= (radius < cutoff)[None, ..., None]
    return parser


@pytest.mark.parametrize("space", [(8, 6), (7, 5), (1, 9), (4, 5, 6), (3, 4, 7)])
def test_the_spectrum_goes_there_and_back(space):
    x = random(2, 3, *space)
    assert spectrum(x).shape[-1] == space[-1] // 2 + 1
    torch.testing.assert_close(from_spectrum(spectrum(x), space), x)
    torch.testing.assert_close(from_spectrum(spectrum(x.bfloat16()), space), x.bfloat16().float())


@pytest.mark.parametrize("trained", [(8, 6), (7, 5), (4, 2), (1, 1)])
@pytest.mark.parametrize("space", [(8, 6), (12, 9), (5, 7), (4, 3), (1, 1)])
def test_an_untrained_parser_passes_everything(trained, space):
    x = random(2, 3, *space)
    torch.testing.assert_close(FFParser(3, trained)(x), x)


@pytest.mark.parametrize("space", [(16, 32), (32, 32), (24, 40), (8, 16), (16, 32, 16), (8, 48, 16)])
def test_a_low_pass_filter_damps_a_checkerboard_at_every_size(space):
    trained = (16, 32, 16)[: len(space)]
    slow = torch.cos(2 * torch.pi * torch.arange(space[0]) / space[0]).reshape(-1, *(1,) * (len(space) - 1))
    slow = slow.expand(1, 1, *space)
    filtered = low_pass(FFParser(1, trained), 0.3)(slow + checkerboard(*space))
    torch.testing.assert_close(filtered, slow, atol=1e-5, rtol=0)


def test_a_filter_is_the_same_filter_at_another_size():
    """A delay by a voxel along the first axis: the phase runs once around, over negative frequencies too."""
    parser = FFParser(1, (64, 4))
    phase = torch.exp(-2j * torch.pi * torch.fft.fftfreq(64))[None, :, None].expand(1, 64, 3)
    with torch.no_grad():
        parser.weight.copy_(torch.view_as_real(phase))
    for n in (64, 48, 80, 31):
        x = random(1, 1, n, 6)
        torch.testing.assert_close(parser(x), x.roll(1, dims=2), atol=0.02, rtol=0)


def test_a_weight_is_interpolated_in_cycles_a_voxel():
    parser = FFParser(1, (4, 8))
    with torch.no_grad():
        parser.weight[0, :, :, 0] = torch.fft.rfftfreq(8)
    for n in (8, 10, 16):
        torch.testing.assert_close(parser.weight_for((6, n))[0, 3, :, 0], torch.fft.rfftfreq(n))


def test_fusion_keeps_what_both_branches_see():
    """Three voxels in four are empty in the image; there the fusion is silent, whatever x_t holds."""
    m_image, m_state = random(1, 8, 8, 8), random(1, 8, 8, 8, seed=1)
    m_image[..., 2:] = 0
    fused = attentive_fusion(m_image, m_state)
    assert not fused[..., 2:].any()
    assert fused[..., :2].all()
    by_hand = (m_image - m_image.mean()) / m_image.std(correction=0) * (m_state - m_state.mean()) / m_state.std()
    torch.testing.assert_close(fused, by_hand * m_image, atol=1e-2, rtol=1e-2)


def test_the_image_branch_depends_on_the_state_and_the_level_from_the_middle_stages_on():
    v1 = network("v1")
    image, x_t, alpha_bar = inputs()
    with torch.no_grad():
        first, other, later = (
            v1.features(image, state, v1.embed(level))[0]
            for state, level in ((x_t, alpha_bar), (x_t.flip(0), alpha_bar), (x_t, alpha_bar.flip(0)))
        )
    assert torch.equal(first[0], other[0]), "the first stage sees the image alone"
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(first[1:], other[1:], strict=True))
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(first, later, strict=True))


def test_the_parser_filters_what_enters_the_fusion_alone():
    v1 = network("v1")
    image, x_t, alpha_bar = inputs()
    before = v1.features(image, x_t, v1.embed(alpha_bar))
    nn.init.zeros_(v1.parsers["1"].weight)
    after = v1.features(image, x_t, v1.embed(alpha_bar))
    assert not after[0][1].any()
    assert before[0][1].any()
    assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dims", "classes", "widths"), [(2, 2, FOUR), (2, 5, FIVE), (3, 3, FOUR), (3, 2, FIVE)])
@pytest.mark.parametrize("space", [SIZE, (32, 16, 16)])
def test_a_denoiser_answers_in_the_images_own_size(kind, dims, classes, widths, space):
    image, x_t, alpha_bar = inputs(dims, classes, space)
    with torch.no_grad():
        output, _ = network(kind, dims, classes, widths)(image, x_t, alpha_bar)
    assert output.shape == x_t.shape
    assert output.std() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", [2, 3])
def test_a_gradient_reaches_every_parameter(kind, dims):
    built = network(kind, dims)
    output, logits = built(*inputs(dims))
    (output.square().mean() + (0 if logits is None else logits.square().mean())).backward()
    assert [name for name, p in built.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("kind", KINDS)
def test_image_and_noise_and_level_all_matter(kind):
    built = network(kind)
    image, x_t, alpha_bar = inputs()
    first, _ = built(image, x_t, alpha_bar)
    for changed in ((image.flip(0), x_t, alpha_bar), (image, x_t.flip(0), alpha_bar), (image, x_t, alpha_bar.flip(0))):
        assert not torch.allclose(built(*changed)[0], first, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_an_item_does_not_depend_on_its_company(kind):
    built = network(kind)
    image, x_t, alpha_bar = inputs()
    together, _ = built(image, x_t, alpha_bar)
    for item in range(2):
        one = slice(item, item + 1)
        alone = built.denoise(built.encode(image[one]), x_t[one], alpha_bar[one])
        torch.testing.assert_close(alone, together[one], atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_denoiser_is_silent(kind):
    assert not KINDS[kind](2, 3, FOUR)(*inputs())[0].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", [2, 3])
def test_half_precision_is_near_enough(kind, dims):
    built = network(kind, dims)
    expected, _ = built(*inputs(dims))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = built(*inputs(dims))
    output.square().mean().backward()
    assert output.dtype == torch.float32
    assert (output - expected).norm() < 0.1 * expected.norm()
