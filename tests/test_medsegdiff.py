import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from medseg_diff.networks.blocks import from_spectrum, spectrum
from medseg_diff.networks.medsegdiff_v1 import FFParser, MedSegDiffV1, attentive_fusion
from medseg_diff.networks.medsegdiff_v2 import AnchorCondition, MedSegDiffV2, NeuralBandPass, SpectralAttention
from medseg_diff.training.objective import mask_loss

FOUR, FIVE = (8, 8, 16, 16), (8, 8, 16, 16, 24)
SIZE = (16, 32, 16)
KINDS = {"v1": MedSegDiffV1, "v2": lambda *options: MedSegDiffV2(*options[:-1])}


def build(kind: str, dims: int = 2, classes: int = 3, widths: tuple[int, ...] = FOUR) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind](dims, 1, classes, widths, SIZE[:dims])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(kind: str, dims: int = 2, classes: int = 3, widths: tuple[int, ...] = FOUR) -> nn.Module:
    """Layers that start at zero would hide what lies before them: they are given a voice."""
    built = build(kind, dims, classes, widths)
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


@pytest.mark.parametrize("size", [(4, 8), (8, 8), (6, 10), (10, 16)])
def test_weights_are_interpolated_in_cycles_a_voxel(size):
    """Along a whole axis around the circle, where the lowest negative frequency lies beside zero."""

    def distance(size: tuple[int, int]) -> Tensor:
        return torch.fft.fftfreq(size[0]).abs()[:, None] + torch.fft.rfftfreq(size[1])

    parser = FFParser(1, (4, 8))
    with torch.no_grad():
        parser.weight[0, ..., 0] = distance(parser.size)
    torch.testing.assert_close(parser.weight_for(size)[0, ..., 0], distance(size))


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


def anchor(dims: int = 2, sigma: float = 1.0) -> AnchorCondition:
    built = AnchorCondition(dims, 4)
    nn.init.constant_(built.log_sigma, math.log(sigma))
    return built


@pytest.mark.parametrize("dims", [2, 3])
def test_the_anchor_is_a_gaussian_of_its_sigma_that_keeps_the_mean(dims):
    space = (9, 11, 9)[:dims]
    point = torch.zeros(1, 4, *space)
    point[..., *(n // 2 for n in space)] = 1
    spread = anchor(dims, 0.8).blur(point)
    torch.testing.assert_close(spread.sum(dim=tuple(range(2, 2 + dims))), torch.ones(1, 4))
    for axis, n in enumerate(space, start=2):
        offset = (torch.arange(n) - n // 2).reshape(-1, *(1,) * (1 + dims - axis))
        assert (spread * offset**2).sum().item() / 4 == pytest.approx(0.8**2, rel=0.01)
    flat = torch.full_like(point, 3)
    torch.testing.assert_close(anchor(dims, 2.0).blur(flat), flat)


def test_the_anchor_is_the_identity_as_sigma_vanishes():
    f = random(2, 4, 8, 6)
    torch.testing.assert_close(anchor(sigma=0.01).blur(f), f)
    torch.testing.assert_close(anchor(sigma=1e-8).blur(f), f)


def test_the_anchor_widens_what_the_condition_model_sees():
    """The gate is sigmoid(f_anc) + 1 with f_anc = max(f * k, f): a bright point brightens its surroundings too."""
    built = anchor()
    nn.init.dirac_(built.project.weight)
    nn.init.zeros_(built.project.bias)
    f = -random(2, 4, 9, 9).abs()
    f[..., 4, 4] = 30
    f_anc = torch.logit(built(f) - 1, eps=1e-7)
    assert (f_anc >= f.clamp(max=15) - 1e-3).all()
    assert (f_anc[..., 3:6, 3:6] > 0).all()
    assert (f_anc[..., 0, 0] < 0).all()


def test_every_channel_learns_its_own_sigma():
    built = anchor()
    built(random(2, 4, 8, 8)).square().sum().backward()
    assert (built.log_sigma.grad != 0).all()


@pytest.mark.parametrize("size", [(8, 6), (7, 5), (1, 1), (4, 6, 5)])
def test_the_band_pass_filter_gates_every_frequency_and_hears_the_level(size):
    torch.manual_seed(0)
    gate = NeuralBandPass(len(size), 8, 16)(size, random(2, 16))
    assert gate.shape == (2, 8, *size[:-1], size[-1] // 2 + 1)
    assert gate.min() > 0
    assert gate.max() < 1
    assert not torch.allclose(gate[0], gate[1], atol=1e-3)
    if size != (1, 1):
        assert gate.flatten(2).std(dim=2).min() > 1e-3, "all frequencies alike"


def test_the_band_pass_filter_shifts_nothing_and_is_the_same_at_every_size():
    torch.manual_seed(0)
    band_pass, embedding = NeuralBandPass(2, 8, 16), random(1, 16)
    gate = band_pass((8, 12), embedding)
    torch.testing.assert_close(gate[:, :, 1:], gate[:, :, 1:].flip(2))
    torch.testing.assert_close(band_pass((16, 24), embedding)[:, :, ::2, ::2], gate)


def attention() -> SpectralAttention:
    torch.manual_seed(0)
    built = SpectralAttention(2, 16, 8)
    for layer in (built.leave, built.perceptron[-1]):
        nn.init.normal_(layer.weight, 0, 0.1)
    return built


def test_an_untrained_block_passes_what_asks():
    asking, asked = random(2, 16, 6, 5), random(2, 16, 6, 5, seed=1)
    assert torch.equal(SpectralAttention(2, 16, 8)(asking, asked, random(2, 8)), asking)


def test_attention_is_that_of_the_spectra():
    """Head by head against the formula: softmax of Re(q k*) / sqrt(16) over all frequencies, times v, gated."""
    built, asking, asked, embedding = attention(), random(1, 16, 6, 5), random(1, 16, 6, 5, seed=1), random(1, 8)
    nn.init.zeros_(built.perceptron[-1].weight)
    nn.init.zeros_(built.perceptron[-1].bias)
    source = built.norm_key(asked)
    q, k, v = (
        torch.fft.rfft2(m, norm="ortho").flatten(2).unflatten(1, (2, 8))[0]
        for m in (built.query(built.norm_query(asking)), built.key(source), built.value(source))
    )
    affinity = torch.einsum("hcm,hcn->hmn", q, k.conj()).real / 4
    answer = torch.einsum("hmn,hcn->hcm", affinity.softmax(-1).to(v.dtype), v).reshape(1, 16, 6, 3)
    answer = torch.fft.irfft2(answer * built.band_pass((6, 5), embedding), s=(6, 5), norm="ortho")
    torch.testing.assert_close(built(asking, asked, embedding), asking + built.leave(answer), atol=1e-5, rtol=1e-4)


def test_condition_and_noise_swap_roles():
    """The condition asks the noise, then the noise asks the answer, and the decoder goes on with what the noise got."""
    v2 = network("v2")
    calls = {}
    v2.condition_asks.register_forward_hook(lambda _, given, made: calls.update(first=(given, made)))
    v2.noise_asks.register_forward_hook(lambda _, given, made: calls.update(second=(given, made)))
    image, x_t, alpha_bar = inputs()
    condition = v2.encode(image)
    v2.denoise(condition, x_t, alpha_bar)
    (semantics, noise, _), blended = calls["first"]
    assert semantics is condition.maps[1]
    assert calls["second"][0][0] is noise
    assert calls["second"][0][1] is blended


def test_what_the_condition_model_computes_serves_every_noise():
    v2 = network("v2")
    image, x_t, alpha_bar = inputs()
    condition = v2.encode(image)
    for state in (x_t, x_t + 1):
        output, logits = v2(image, state, alpha_bar)
        assert torch.equal(output, v2.denoise(condition, state, alpha_bar))
        assert torch.equal(logits, condition.logits)
    assert logits.shape == x_t.shape


@pytest.mark.parametrize("coupling", [0, 1])
def test_each_coupling_alone_lets_the_condition_matter(coupling):
    v2 = network("v2")
    image, x_t, alpha_bar = inputs()
    condition = v2.encode(image)
    maps = list(condition.maps)
    maps[coupling] = maps[coupling].flip(0)
    changed = v2.denoise(replace(condition, maps=tuple(maps)), x_t, alpha_bar)
    assert not torch.allclose(changed, v2.denoise(condition, x_t, alpha_bar), atol=1e-3)


def test_the_diffusion_loss_teaches_the_condition_model_but_not_its_head():
    v2 = network("v2")
    output, _ = v2(*inputs())
    output.square().mean().backward()
    assert all(p.grad is None for p in v2.condition_head.parameters())
    assert all(p.grad is not None and p.grad.any() for p in v2.condition.parameters())


@pytest.mark.parametrize("teach_condition", [False, True])
def test_the_loss_gives_every_parameter_a_gradient(teach_condition):
    """Gradients of processes are added up for every parameter; where the head is not taught, its own is zero."""
    v2 = network("v2")
    image, noise, _ = inputs()
    labels = torch.randint(0, 3, (2, *SIZE[:2]), generator=torch.Generator().manual_seed(2))
    options = {"classes": 3, "scale": 0.5, "prediction": "velocity", "weighting": "uniform"}
    level = torch.tensor([0.2, 0.9])
    mask_loss(v2, image, labels, level, noise, **options, teach_condition=teach_condition).backward()
    gradients = {name: p.grad for name, p in v2.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    silent = {name for name, gradient in gradients.items() if not gradient.any()}
    assert silent == (set() if teach_condition else {"condition_head.weight", "condition_head.bias"})


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
    assert not build(kind)(*inputs())[0].any()


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
