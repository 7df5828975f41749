import numpy as np
import pytest
import torch

from medseg_diff import ensemble
from medseg_diff.ensemble import Tally, agreement, interval90, nominal_level, staple


def tally_of(labels: torch.Tensor, classes: int) -> Tally:
    tally = Tally.empty(len(labels), classes)
    tally.add(labels)
    return tally


def test_counts_by_hand():
    labels = torch.tensor([[0, 1, 1, 2], [0, 1, 2, 2], [0, 0, 0, 0]], dtype=torch.uint8)
    tally = tally_of(labels, 3)
    assert tally.counts.tolist() == [[1, 2, 1], [1, 1, 2], [4, 0, 0]]
    assert tally.common[0, 1].tolist() == [1, 1, 1]
    assert tally.common[1, 0].tolist() == [1, 1, 1]
    assert tally.common[0, 2].tolist() == [1, 0, 0]
    assert torch.equal(tally.common.diagonal().T, tally.counts)


def test_agreement_by_hand():
    labels = torch.tensor([[0, 1, 1, 2], [0, 1, 2, 2], [0, 0, 0, 0]], dtype=torch.uint8)
    background = (2 / 2 + 2 / 5 + 2 / 5) / 3
    assert agreement(tally_of(labels, 4)) == pytest.approx([background, 2 / 9, 2 / 9, 1])


def test_parts_add_up_to_the_whole(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (5, 6, 7, 8), dtype=torch.uint8, generator=generator)
    whole, parts = tally_of(labels, 3), Tally.empty(5, 3)
    monkeypatch.setattr(ensemble, "VOXELS_AT_ONCE", 50)
    for part in labels.split([1, 2, 3], dim=1):
        parts.add(part)
    assert torch.equal(whole.counts, parts.counts)
    assert torch.equal(whole.common, parts.common)


def test_counts_beyond_float32_stay_exact():
    tally = Tally.empty(2, 2)
    tally.counts += 2.0**25
    tally.add(torch.ones(2, 1, dtype=torch.uint8))
    assert tally.counts[:, 1].tolist() == [2**25 + 1] * 2


@pytest.mark.parametrize(("samples", "level"), [(19, 0.9), (16, 15 / 17), (64, 0.9), (2, 1 / 3)])
def test_a_right_sampler_covers_the_nominal_level(samples, level):
    """The truth and the draws come from one law, so that the truth's rank is uniform."""
    assert nominal_level(samples) == pytest.approx(level)
    rng = np.random.default_rng(0)
    trials = 10_000
    truth, draws = rng.gamma(2, size=trials), rng.gamma(2, size=(trials, samples))
    low, high = np.array([interval90(d, float(np.median(d))) for d in draws]).T
    assert np.mean((low <= truth) & (truth <= high)) == pytest.approx(level, abs=0.015)


def test_the_interval_holds_what_is_reported():
    volumes = np.arange(1.0, 20.0)
    assert interval90(volumes, 5.0) == (1.0, 19.0)
    assert interval90(volumes, 0.0) == (0.0, 19.0)
    assert interval90(volumes, 30.0) == (1.0, 30.0)


def raters(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A truth of two labels, and five samples of which three are careless."""
    rng = np.random.default_rng(seed)
    truth = np.zeros((12, 12, 12), np.uint8)
    truth[2:7, 2:10, 2:10], truth[7:10, 2:10, 2:10] = 1, 2
    wrong = rng.random((5, *truth.shape)) < np.array([0.05, 0.05, 0.45, 0.45, 0.45])[:, None, None, None]
    return truth, np.where(wrong, rng.integers(0, 3, wrong.shape), truth).astype(np.uint8)


def test_staple_trusts_those_who_agree():
    """Two careful samples against three careless ones: STAPLE finds out whom to trust, a vote does not."""
    truth, samples = raters()
    found = staple(samples, 3)
    assert found.shape == (3, *truth.shape)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-5)
    votes = np.stack([(samples == k).mean(0) for k in range(3)]).argmax(0)
    assert (found.argmax(0) != truth).mean() < 0.7 * (votes != truth).mean()


def test_staple_is_em_by_hand():
    """One label and its background, against Warfield's two steps written out."""
    rng = np.random.default_rng(1)
    truth = rng.random(4000) < 0.3
    drawn = np.stack([np.where(rng.random(4000) < wrong, ~truth, truth) for wrong in (0.1, 0.2, 0.4)])
    prior, sensitivity, specificity = drawn.mean(), np.full(3, 0.99), np.full(3, 0.99)
    for _ in range(300):
        a = prior * np.prod(np.where(drawn, sensitivity[:, None], 1 - sensitivity[:, None]), 0)
        b = (1 - prior) * np.prod(np.where(drawn, 1 - specificity[:, None], specificity[:, None]), 0)
        weight = a / (a + b)
        sensitivity = (drawn * weight).sum(1) / weight.sum()
        specificity = (~drawn * (1 - weight)).sum(1) / (1 - weight).sum()
    found = staple(drawn.reshape(3, 20, 20, 10).astype(np.uint8), 2)[1].ravel()
    np.testing.assert_allclose(found, weight, atol=0.05)


def test_staple_of_samples_that_agree_or_are_empty():
    truth, _ = raters()
    found = staple(np.stack([truth] * 3), 4)
    assert np.isfinite(found).all()
    assert np.array_equal(found.argmax(0), truth)
    assert (found[3] == 0).all()
