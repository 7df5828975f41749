import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medseg_diff import inference
from medseg_diff.checkpoint import Model, load_model
from medseg_diff.datasets.slices import with_neighbours
from medseg_diff.diffusion.fields import COARSE, SPACINGS, cells
from medseg_diff.errors import UserError
from medseg_diff.inference import REPEAT, Noise, predict, trace
from medseg_diff.networks.blocks import Condition, nearest
from medseg_diff.networks.conditional import STRIDE, Features
from medseg_diff.windows import Window, pad_to_stride, windows

CPU = torch.device("cpu")
SHAPE = (34, 20, 18)
KINDS = ("volumes", "slices", "unet", "v1", "v2", "classic")


@pytest.fixture(scope="module")
def model(models) -> dict[str, Model]:
    return {name: load_model(models[name], CPU) for name in KINDS}


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))


class Pointwise(nn.Module):
    """A network that sees one voxel at a time: cutting a scan into windows can't change what it says."""

    def encode(self, image: Tensor) -> Features:
        x = image.mean(1, keepdim=True)
        return Features(torch.cat([x, x.square(), -x], 1), ())

    def denoiser(self, features: Features, x_t: Tensor, level: Tensor, shared: Tensor, fields: Tensor) -> Tensor:
        state = nearest(x_t.flatten(0, 1), STRIDE).unflatten(0, x_t.shape[:2])
        detail = nearest(fields.sum(3).flatten(0, 1), COARSE).unflatten(0, fields.shape[:2])
        of_scan = shared.sum(3).reshape(*shared.shape[:3], *(1,) * (x_t.ndim - 3))
        return features.mean_logits + state + detail + of_scan


def settings(model: Model, network: nn.Module | None = None, **data: object) -> Model:
    config = model.about.config
    config = config.model_copy(update={"data": config.data.model_copy(update=data)})
    return replace(model, network=network or model.network, about=replace(model.about, config=config))


def drawn(model: Model, image: Tensor, samples: int = 3, **options: int) -> tuple[inference.Prediction, np.ndarray]:
    keep = np.full((samples, *image.shape[1:]), 255, np.uint8)
    options = {"steps": 1, "seed": 0, **options}
    return predict(model, image, samples=samples, keep=keep, **options), keep


def test_padding_reaches_the_next_stride():
    assert pad_to_stride((1, 16, 17, 40), (8,) * 4) == (16, 16, 24, 40)
    assert pad_to_stride((1, 16, 17, 40), (8,) * 5) == (32, 32, 32, 48)


@pytest.mark.parametrize("levels", [4, 5])
@pytest.mark.parametrize("size", [(16, 16), (32, 48), (64, 64), (96, 16)])
def test_cores_tile_the_volume(size, levels):
    for space in itertools.product((1, 15, 16, 17, 40, 64, 100, 131, 255), repeat=2):
        padded = pad_to_stride(space, (8,) * levels)
        count = np.zeros(space, int)
        found = windows(space, padded, size)
        for window in found:
            count[window.core] += 1
            for start, length, core, end in zip(window.start, window.size, window.core, padded, strict=True):
                assert start <= core.start < core.stop <= start + length <= end
                assert start % 8 == length % 8 == 0
        assert (count == 1).all()
        assert len({window.size for window in found}) == 1
        if np.prod(padded) <= 4 * np.prod(size):
            assert len(found) == 1


def test_a_voxel_is_judged_away_from_its_windows_rim():
    """Except at the rim of the volume, a core keeps a quarter of the window from the window's border."""
    for window in windows((320, 16), (320, 16), (64, 16)):
        core, start = window.core[0], window.start[0]
        assert start == 0 or core.start - start >= 16
        assert start + 64 == 320 or start + 64 - core.stop >= 16


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("kind", "size"), [("volumes", (16, 16, 16)), ("slices", (16, 16))])
def test_windows_do_not_show(model, image, kind, size, steps):
    whole, all_at_once = drawn(settings(model[kind], Pointwise(), size=(48, 48, 48)[: len(size)]), image, steps=steps)
    cut, windowed = drawn(settings(model[kind], Pointwise(), size=size), image, steps=steps)
    torch.testing.assert_close(whole.probabilities, cut.probabilities, atol=1e-5, rtol=0)
    assert np.array_equal(all_at_once, windowed)
    assert torch.equal(whole.tally.common, cut.tally.common)
    expected = Pointwise().encode(image[None]).mean_logits.softmax(1)[0]
    if kind == "volumes":
        torch.testing.assert_close(whole.probabilities, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_return_to_their_places(model, image, axis):
    slices = settings(model["slices"], Pointwise(), axis=axis, neighbours=0)
    found, _ = drawn(slices, image)
    expected = Pointwise().encode(image[None]).mean_logits.softmax(1)[0]
    torch.testing.assert_close(found.probabilities, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_share_the_noise_of_their_volume(model, axis):
    """On an image without content every slice of a sample is the same, and no two samples are."""
    _, masks = drawn(settings(model["slices"], Pointwise(), axis=axis), torch.zeros(1, *SHAPE))
    across = np.moveaxis(masks, axis + 1, 1)
    assert (across == across[:, :1]).all()
    assert len(np.unique(across[:, 0].reshape(3, -1), axis=0)) == 3


def window(start: tuple[int, ...], size: tuple[int, ...]) -> Window:
    return Window(start, size, tuple(slice(a, a + n) for a, n in zip(start, size, strict=True)))


def test_noise_of_a_window_is_the_crop_of_the_volumes():
    noise = Noise(3, 2, (48, 32), 4)
    whole, part = window((0, 0), (48, 32)), window((16, 0), (32, 16))
    assert torch.equal(noise.map(1, 0, part), noise.map(1, 0, whole)[:, 4:12, 0:4])
    second = range(1, 2)
    torch.testing.assert_close(noise.fields(second, 0, part), noise.fields(second, 0, whole)[..., 8:24, 0:8])


def test_fields_of_a_long_volume_agree_between_windows_and_fill_no_memory():
    """The white noise of the roughest comes again after REPEAT cells, and not before."""
    noise, period = Noise(3, 2, (1024, 16), 4), REPEAT * SPACINGS[0]
    whole = noise.fields(range(1), 0, window((0, 0), (1024, 16)))[0]
    for start in (0, 232, 264, 960):
        part = noise.fields(range(1), 0, window((start, 0), (64, 16)))[0]
        torch.testing.assert_close(part, whole[:, :, start // 2 : start // 2 + 32])
    across = [len(cells(0, 16, spacing)) for spacing in SPACINGS]
    assert sum(x.numel() for x in noise.kept.values()) == 2 * REPEAT * sum(across)
    rough = whole[:, 0].movedim(1, 0).flatten(1)
    torch.testing.assert_close(rough[: period // 2], rough[period // 2 : period])
    apart = torch.cdist(rough[: period // 2], rough[: period // 2])
    assert apart[torch.ones_like(apart).triu(8).bool()].min() > 0.5


@pytest.mark.parametrize("kind", ["map", "vector", "fields"])
def test_every_noise_has_its_key(kind):
    """Seed, sample and call: another of them is another noise, the same are the same."""
    place = window((0, 0), (32, 32))

    def noise(seed: int, sample: int, call: int) -> Tensor:
        of_volume = Noise(seed, 3, (32, 32), 4)
        match kind:
            case "map":
                return of_volume.map(sample, call, place)
            case "vector":
                return of_volume.vector(sample, call)
        return of_volume.fields(range(sample, sample + 1), call, place)

    keys = list(itertools.product((0, 1), repeat=3))
    found = torch.stack([noise(*key).flatten() for key in keys])
    assert torch.equal(found, torch.stack([noise(*key).flatten() for key in keys]))
    assert (torch.cdist(found, found) + 100 * torch.eye(len(keys)) > 1).all()


def test_noises_are_standard_normal_and_independent():
    keys = [(seed, sample, call) for seed in (0, 1) for sample in (0, 1) for call in (0, 1)]
    place = window((0, 0), (256, 256))
    maps = torch.stack([Noise(s, 3, (256, 256), 4).map(i, c, place).flatten() for s, i, c in keys])
    assert (maps.mean(1).abs() < 0.05).all()
    assert ((maps.var(1) - 1).abs() < 0.06).all()
    assert ((torch.corrcoef(maps) - torch.eye(len(keys))).abs() < 0.05).all()


@pytest.mark.parametrize("kind", ["volumes", "slices", "v1", "classic"])
def test_samples_do_not_depend_on_how_they_are_grouped(model, image, kind, monkeypatch):
    together, all_at_once = drawn(model[kind], image, steps=2)
    monkeypatch.setattr(inference, "VOXELS_AT_ONCE", 5_000)
    apart, one_by_one = drawn(model[kind], image, steps=2)
    assert (all_at_once == one_by_one).mean() > 0.999, "only a tie may fall otherwise"
    torch.testing.assert_close(together.probabilities, apart.probabilities, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["volumes", "slices", "v2", "classic"])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_seed_decides_every_sample(model, image, kind, steps):
    _, first = drawn(model[kind], image, steps=steps)
    _, same = drawn(model[kind], image, steps=steps)
    _, fewer = drawn(model[kind], image, samples=2, steps=steps)
    _, other = drawn(model[kind], image, steps=steps, seed=1)
    assert np.array_equal(first, same)
    assert (first[:2] == fewer).mean() > 0.999
    assert not np.array_equal(first, other)
    assert set(np.unique(first)) == {0, 1, 2}
    assert not np.array_equal(first[0], first[1])


@pytest.mark.parametrize("kind", ["volumes", "slices", "v1", "classic"])
def test_the_tally_counts_the_samples(model, image, kind):
    found, masks = drawn(model[kind], image)
    for index in range(3):
        assert found.tally.counts[:, index].tolist() == (masks == index).sum((1, 2, 3)).tolist()
        assert found.tally.common[0, 1, index] == ((masks[0] == index) & (masks[1] == index)).sum()
    torch.testing.assert_close(found.probabilities.sum(0), torch.ones(SHAPE))
    assert found.samples is masks


def test_a_network_that_answers_nothing_is_an_error(model, image):
    class Lost(Pointwise):
        def encode(self, image: Tensor) -> Features:
            return Features(super().encode(image).mean_logits * torch.nan, ())

    with pytest.raises(UserError, match="not finite"):
        predict(settings(model["volumes"], Lost()), image, samples=2, steps=1, seed=0)


def test_samples_are_counted_and_forgotten(model, image):
    assert predict(model["volumes"], image, samples=2, steps=1, seed=0).samples is None


def test_a_deterministic_network_draws_nothing(model, image):
    found = predict(model["unet"], image, samples=0, steps=1, seed=0)
    assert found.tally is None
    torch.testing.assert_close(found.probabilities.sum(0), torch.ones(SHAPE))


@pytest.mark.parametrize("size", [(48, 32, 32), (16, 16, 16)])
@pytest.mark.parametrize("steps", [1, 3])
def test_no_noise_is_drawn_in_vain(model, image, steps, size, monkeypatch):
    """Maps for x_T and the steps that add noise, none where there is but one, which doesn't see it; for each call a
    vector and a field's noise a scale. Once for all.
    """
    calls = []

    def mix(*numbers: int) -> int:
        calls.append(numbers)
        return sum(numbers)

    monkeypatch.setattr(inference, "_mix", mix)
    predict(settings(model["volumes"], Pointwise(), size=size), image, samples=1, steps=steps, seed=0)
    assert len(calls) == len(set(calls)) == (steps if steps > 1 else 0) + (1 + len(SPACINGS)) * steps


def test_noise_that_is_not_kept_is_the_same(model, image, monkeypatch):
    windowed = settings(model["volumes"], Pointwise(), size=(16, 16, 16))
    _, kept = drawn(windowed, image, steps=2)
    monkeypatch.setattr(inference, "NOISE_KEPT", 1000)
    _, drawn_again = drawn(windowed, image, steps=2)
    assert np.array_equal(kept, drawn_again)


def test_slices_are_cut_before_their_neighbours_join(model, image, monkeypatch):
    seen = []

    def watched(stack: Tensor, *rest: object) -> Tensor:
        seen.append(tuple(stack.shape[2:]))
        return with_neighbours(stack, *rest)

    monkeypatch.setattr(inference, "with_neighbours", watched)
    drawn(settings(model["slices"], Pointwise(), size=(16, 16), axis=2), torch.cat([image, image, image], 2))
    assert len(seen) > 1
    assert set(seen) == {(16, 16)}


@pytest.mark.parametrize(("kind", "size"), [("volumes", (16, 16, 16)), ("slices", (16, 16)), ("unet", (48, 48, 48))])
def test_progress_is_told_of_every_part(model, image, kind, size, monkeypatch):
    monkeypatch.setattr(inference, "VOXELS_AT_ONCE", 5_000)
    shares: list[float] = []
    found = settings(model[kind], Pointwise(), size=size)
    predict(found, image, samples=int(kind != "unet"), steps=1, seed=0, progress=shares.append)
    assert sum(shares) == pytest.approx(1)
    assert (len(shares) > 1) == (kind != "unet")


@pytest.mark.parametrize("kind", ["volumes", "slices"])
def test_a_trace_shows_how_the_first_sample_came_about(model, image, kind):
    one_window = settings(model[kind], size=(48, 48, 48)[: model[kind].about.config.data.spatial_dims])
    _, masks = drawn(one_window, image, steps=3)
    seen = trace(one_window, image, steps=3, seed=0)
    assert [(tuple(noisy.shape), tuple(p.shape)) for noisy, p in seen] == [((3, *SHAPE),) * 2] * 3
    assert (seen[-1][1].argmax(0).numpy() == masks[0]).mean() > 0.999
    first = seen[0][0] if kind == "volumes" else seen[0][0][:, :, 7]
    coarse = tuple(n // STRIDE for n in pad_to_stride(tuple(first.shape[1:]), (8, 8, 8, 8)))
    size = tuple(STRIDE * n for n in coarse)
    x_T = Noise(0, 3, size, STRIDE).map(0, 0, window((0,) * len(coarse), size))
    on_grid = first[(..., *[slice(None, None, STRIDE)] * len(coarse))]
    assert torch.equal(on_grid, x_T[(..., *map(slice, on_grid.shape[1:]))])


class Knowing(nn.Module):
    """A denoiser of masks that says x_0 of a known mask, or of one of two by the sign of x_t's mean."""

    def __init__(self, masks: list[Tensor], axis: int) -> None:
        super().__init__()
        self.masks, self.axis, self.calls = masks, axis, 0

    def encode(self, image: Tensor) -> Condition:
        return Condition((image,), None)

    def denoise(self, condition: Condition, x_t: Tensor, level: Tensor) -> Tensor:
        self.calls += 1
        chosen = (x_t.flatten(1).mean(1) > 0).long() % len(self.masks)
        stacked = torch.stack(self.masks)[chosen]
        return stacked[..., : x_t.shape[-2], : x_t.shape[-1]]


def knowing(model: Model, masks: list[Tensor], **segment: object) -> Model:
    """Slices along x of a scan of 20 x 18, padded to 24 x 24; the network predicts x_0 in [-1, 1]."""
    told = settings(model, Knowing(masks, 0), axis=0, neighbours=0, size=(32, 32))
    config = told.about.config
    changed = {
        "diffusion": config.diffusion.model_copy(update={"prediction": "x0", "scale": 1.0}),
        "segment": config.segment.model_copy(update=segment),
    }
    return replace(told, about=replace(told.about, config=config.model_copy(update=changed)))


def analog(label: int) -> Tensor:
    mask = -torch.ones(3, 32, 32)
    mask[0] = 1
    mask[:, 4:9, 4:9] = -1
    mask[label, 4:9, 4:9] = 1
    return mask


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "dpm++sde", "heun"])
@pytest.mark.parametrize("fuse", ["mean", "vote", "staple"])
def test_a_denoiser_that_knows_the_mask_draws_it(model, image, sampler, fuse):
    told = knowing(model["v1"], [analog(2)], sampler=sampler, fuse=fuse)
    found, masks = drawn(told, image, steps=4)
    expected = analog(2).argmax(0)[:20, :18]
    assert (masks == expected.numpy()).all()
    assert torch.equal(found.probabilities.argmax(0), expected.expand(34, 20, 18))
    assert found.probabilities.min() >= 0
    torch.testing.assert_close(found.probabilities.sum(0), torch.ones(SHAPE))
    assert told.network.calls == (6 if sampler == "heun" else 4), "not twice from pure noise nor to clean"


def test_what_samples_say_together_is_reported(model, image):
    """Two masks, drawn by the noise: a voxel's probability is the share of the samples that have it."""
    told = knowing(model["v1"], [analog(1), analog(2)])
    found, masks = drawn(told, image, samples=6, steps=1)
    share = (masks == 2).mean(0)
    assert 0 < share[0, 5, 5] < 1
    torch.testing.assert_close(found.probabilities[2].numpy(), share, atol=1e-5, rtol=0, check_dtype=False)
    voted = predict(knowing(model["v1"], [analog(1), analog(2)], fuse="vote"), image, samples=6, steps=1, seed=0)
    torch.testing.assert_close(voted.probabilities, found.probabilities, atol=1e-5, rtol=0)
    assert voted.samples is None


def test_a_voice_beside_a_mask_is_heard_by_the_mean_and_not_by_the_vote(model, image):
    unsure = analog(1) * 0.2
    mean, vote = (
        predict(knowing(model["v1"], [unsure], fuse=fuse), image, samples=2, steps=1, seed=0).probabilities[1, 0, 5, 5]
        for fuse in ("mean", "vote")
    )
    assert mean.item() == pytest.approx(0.6 / 1.4, abs=1e-4)
    assert vote == 1


@pytest.mark.parametrize("kind", ["v1", "classic"])
def test_a_trace_of_a_denoiser_goes_from_noise_to_the_mask(model, image, kind):
    size = (48, 48, 48)[: model[kind].about.config.data.spatial_dims]
    one_window = settings(model[kind], size=size)
    _, masks = drawn(one_window, image, steps=3)
    seen = trace(one_window, image, steps=3, seed=0)
    assert [(tuple(noisy.shape), tuple(p.shape)) for noisy, p in seen] == [((3, *SHAPE),) * 2] * 3
    assert (seen[-1][1].argmax(0).numpy() == masks[0]).mean() > 0.99
    assert seen[0][0].std().item() == pytest.approx(1, abs=0.05)
