import math

import numpy as np
import pytest
from scipy.ndimage import binary_erosion, distance_transform_edt, gaussian_filter

from medseg_diff.diffusion.masks import IGNORED
from medseg_diff.uncertainty import calibration, diversity
from medseg_diff.uncertainty.calibration import Calibration, border_band, expected_dice, rank_correlation
from medseg_diff.uncertainty.diversity import sample_measures
from medseg_diff.uncertainty.volumes import crps, volume_measures


def masks(*rows: list[int]) -> np.ndarray:
    return np.array(rows, np.uint8)


def test_samples_against_two_references_by_hand():
    """Distances of samples to references: 0, 1/2 | 1/2, 0 | 1, 1; among samples 1/2, 1, 1; among references 1/2."""
    samples, references = masks([1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]), masks([1, 1, 0, 0], [1, 0, 0, 0])
    found = sample_measures(samples, references)
    assert found.energy == pytest.approx(2 * 0.5 - 5 / 6)
    assert found.ged2 == pytest.approx(2 * 0.5 - 5 / 6 - 1 / 2)
    assert found.ged2_diagonal == pytest.approx(2 * 0.5 - 5 / 9 - 1 / 4)
    assert found.implausible == pytest.approx(1 / 3)
    # Twice every sample, three times every reference: two pairs of IoU 1 each, and two of IoU 0.
    assert found.hm_iou == pytest.approx(4 / 6)
    # Three times either sample, and two of the six pairs fit.
    assert sample_measures(samples[[0, 0]], samples[[0, 2, 2]]).hm_iou == pytest.approx(2 / 6)


def test_masks_of_another_label_and_its_presence():
    samples, references = masks([2, 2], [0, 1], [0, 0], [1, 2]), masks([2, 1], [0, 0])
    found = sample_measures(samples, references, 2)
    assert (found.presence, found.reference_presence) == (0.5, 0.5)
    assert found.presence_brier == 0
    assert sample_measures(samples, references[:1], 1).presence_brier == pytest.approx(0.25)
    assert sample_measures(samples == 2, references == 2) == found


def test_empty_masks_are_alike():
    found = sample_measures(masks([0, 0], [0, 0]), masks([0, 0], [0, 0]))
    assert (found.ged2, found.ged2_diagonal, found.hm_iou, found.implausible) == (0, 0, 1, 0)


def test_what_one_mask_cannot_tell_is_undefined():
    one, two = masks([1, 0]), masks([1, 0], [1, 1])
    assert math.isnan(sample_measures(two, one).ged2)
    assert sample_measures(two, one).energy == pytest.approx(2 * 0.25 - 0.5)
    assert math.isnan(sample_measures(one, two).energy)
    assert sample_measures(one, two).ged2_diagonal == pytest.approx(2 * 0.25 - 0.25)
    with pytest.raises(ValueError, match="0 references"):
        sample_measures(two, two[:0])


def test_a_right_sampler_has_no_ged_and_coins_are_implausible(monkeypatch):
    """Samples and references of one law, in parts; then coins with the marginals of that law."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(diversity, "VOXELS_AT_ONCE", 5000)

    def discs(count: int) -> np.ndarray:
        radius = rng.choice([6, 9, 12], count)[:, None, None]
        return (np.hypot(*np.mgrid[-15:16, -15:16]) < radius).astype(np.uint8)

    right = sample_measures(discs(200), discs(100))
    coins = sample_measures((rng.random((200, 31, 31)) < discs(1000).mean(0)).astype(np.uint8), discs(100))
    assert abs(right.ged2) < 0.01
    assert (right.implausible, coins.implausible) == (0, 1)
    assert right.hm_iou > 0.95 > 0.75 > coins.hm_iou


def add(found: Calibration, p_of_one: list[float], labels: list[int]) -> Calibration:
    p = np.array(p_of_one, np.float32)
    found.add(np.stack([1 - p, p]), np.array(labels))
    return found


def test_calibration_by_hand():
    """The last voxel and the second are wrong; ordered by confidence: right, wrong, right, wrong."""
    found = add(Calibration(), [0.998, 0.005, 0.9, 0.4], [1, 1, 1, 1]).measures()
    assert found.nll == pytest.approx(-np.log([0.998, 0.005, 0.9, 0.4]).mean(), rel=1e-5)
    assert found.brier == pytest.approx(2 * np.mean([0.002**2, 0.995**2, 0.1**2, 0.6**2]), rel=1e-5)
    assert found.ece == pytest.approx(np.mean([0.002, 0.995, 0.1, 0.6]), rel=1e-5)
    assert found.confident_errors == 0.5
    assert found.error_auroc == pytest.approx(1 / 4 + 1 / 2)
    assert found.aurc == pytest.approx(np.mean([0, 1 / 2, 1 / 3, 2 / 4]))
    assert math.isnan(found.ece_band)


def test_certain_errors_cost_what_the_clip_says():
    assert add(Calibration(), [0.0], [1]).measures().nll == pytest.approx(-math.log(calibration.SMALLEST))


def test_equal_confidence_shares_a_bin_and_a_tie():
    """Ten voxels of confidence .8, eight of them right, are calibrated; their uncertainty tells nothing."""
    found = add(Calibration(), [0.8] * 10, [1] * 8 + [0] * 2)
    assert found.measures().ece == pytest.approx(0, abs=1e-6)
    assert found.measures().error_auroc == 0.5
    assert found.measures().aurc == pytest.approx(0.2)
    assert found.reliability().accuracy == pytest.approx([0.8])


def test_bins_hold_equal_numbers_and_rise():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.5, 1, 150_000)
    found = add(Calibration(), p.tolist(), (rng.random(len(p)) < p**2).astype(int).tolist()).reliability()
    assert found.weight == pytest.approx([1 / 15] * 15, abs=4e-3)
    assert found.confidence == pytest.approx(0.5 + (np.arange(15) + 0.5) / 30, abs=2e-3)
    assert found.accuracy == pytest.approx(found.confidence**2, abs=0.015)
    assert found.ece == pytest.approx(np.mean(p - p**2), abs=3e-3)


def test_cases_are_counted_together():
    """Two cases that err in opposite directions at the same confidence are calibrated together, not one by one."""
    halves = [([0.75] * 4, [1, 1, 1, 1]), ([0.75] * 4, [1, 1, 0, 0])]
    assert [add(Calibration(), *half).measures().ece for half in halves] == pytest.approx([0.25, 0.25], abs=1e-6)
    both = Calibration()
    for half in halves:
        add(both, *half)
    assert both.measures().ece == pytest.approx(0, abs=1e-6)
    assert both.measures().aurc == pytest.approx(0.25)


def test_three_classes_in_parts(monkeypatch):
    """Errors of a map of several classes, with maps that come one by one, against a straightforward count."""
    rng = np.random.default_rng(1)
    p = rng.dirichlet([0.4, 0.3, 0.3], (20, 20, 20)).astype(np.float32)
    labels = rng.integers(0, 3, p.shape[:-1])
    monkeypatch.setattr(calibration, "VOXELS_AT_ONCE", 3000)
    found = Calibration()
    found.add((p[..., k] for k in range(3)), labels)
    wrong, u = (p.argmax(-1) != labels).ravel(), 1 - p.max(-1).ravel()
    pairs = u[wrong][:, None] - u[~wrong]
    measures = found.measures()
    assert measures.error_auroc == pytest.approx(((pairs > 0) + (pairs == 0) / 2).mean(), abs=1e-3)
    risk = np.cumsum(wrong[np.argsort(u)]) / np.arange(1, u.size + 1)
    assert measures.aurc == pytest.approx(risk.mean(), abs=1e-3)
    assert measures.brier == pytest.approx(((p - np.eye(3)[labels]) ** 2).sum(-1).mean(), rel=1e-4)
    assert measures.confident_errors == pytest.approx((u[wrong] <= 0.01).mean(), abs=1e-3)


def test_what_is_to_be_ignored_is_not_counted():
    p = np.random.default_rng(0).dirichlet((1, 1), (6, 20)).T.astype(np.float32).reshape(2, 20, 6)
    reference = np.random.default_rng(1).integers(0, 2, (20, 6)).astype(np.uint8)
    whole, half = Calibration(), Calibration()
    whole.add(p, np.where(np.arange(20)[:, None] < 10, reference, IGNORED))
    half.add(p[:, :10], reference[:10])
    found, wanted = whole.measures(), half.measures()
    for name in ("nll", "brier", "ece", "confident_errors", "error_auroc", "aurc"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), nan_ok=True)


def test_the_band_is_three_voxels_on_each_side():
    labels = np.zeros((20, 5, 5), np.uint8)
    labels[10:] = 2
    assert np.flatnonzero(border_band(labels)[:, 2, 2]).tolist() == list(range(7, 13))
    assert not border_band(labels * 0).any()
    assert border_band(labels[:, :1, 0]).sum() == 6
    blobs = gaussian_filter(np.random.default_rng(0).normal(size=(30, 25, 20)), 4) > 0
    inner = [mask & ~binary_erosion(mask, border_value=1) for mask in (blobs, ~blobs)]
    assert np.array_equal(border_band(blobs.astype(int)), distance_transform_edt(~(inner[0] | inner[1])) < 3)


def test_the_error_of_the_band_is_of_its_voxels():
    labels = np.zeros(40, np.uint8)
    labels[20:] = 1
    p = np.where(border_band(labels), 0.6, 1.0)
    found = add(Calibration(), np.where(labels == 1, p, 1 - p).tolist(), labels.tolist()).measures()
    assert found.ece_band == pytest.approx(0.4, abs=1e-6)
    assert found.ece == pytest.approx(0.4 * 6 / 40, abs=1e-6)
    assert math.isnan(found.error_auroc)
    assert math.isnan(found.confident_errors)


def test_nothing_was_counted():
    assert all(math.isnan(value) for value in vars(Calibration().measures()).values())
    assert len(Calibration().reliability().weight) == 0


def test_volumes_by_hand():
    found = volume_measures(np.array([1.0, 2.0, 4.0]), (1.0, 4.0), 2.0)
    assert found.covered
    assert found.interval_width == 1.5
    assert (found.raw_covered, found.raw_width) == (True, pytest.approx((3.8 - 1.1) / 2))
    assert not volume_measures(np.array([1.0, 2.0, 4.0]), (1.0, 4.0), 1.05).raw_covered
    assert found.crps == pytest.approx((1 - 2 * (1 + 3 + 2) / 6 / 2) / 2)
    assert not volume_measures(np.array([3.0, 4.0]), (3.0, 4.0), 2.0).covered
    absent = volume_measures(np.array([0.0, 1.0]), (0.0, 1.0), 0.0)
    assert absent.covered
    assert not absent.raw_covered
    assert math.isnan(absent.raw_width)
    assert math.isnan(absent.crps)
    assert math.isnan(absent.interval_width)
    assert math.isnan(crps(np.array([1.0]), 1.0))


@pytest.mark.parametrize("samples", [4, 16])
def test_a_right_sampler_covers_what_is_said_of_the_raw_interval(samples):
    """For a uniform law the interpolation between two order statistics is exact."""
    volumes = np.random.default_rng(0).uniform(1, 2, size=(8000, samples + 1))
    covered = [volume_measures(v[1:], (0.0, 0.0), float(v[0])).raw_covered for v in volumes]
    assert np.mean(covered) == pytest.approx(0.9 * (samples - 1) / (samples + 1), abs=0.015)


def test_the_score_of_volumes_is_fair():
    """Its mean is the same of few draws and of many: for a standard normal at its median 2 phi(0) - 1 / sqrt(pi)."""
    rng = np.random.default_rng(0)
    for n in (2, 50):
        scores = [crps(rng.normal(size=n), 0.0) for _ in range(20_000 // n)]
        assert np.mean(scores) == pytest.approx(2 / math.sqrt(2 * math.pi) - 1 / math.sqrt(math.pi), abs=0.02)


def test_expected_dice_by_hand():
    assert expected_dice(np.array([1.0, 1.0, 0.0])) == 1
    assert expected_dice(np.array([[0.9, 0.5], [0.2, 0.0]])) == pytest.approx(2 * 1.4 / (1.6 + 2))
    assert expected_dice(np.full(4, 1e-4)) == pytest.approx(2 * 4e-4 / (4e-4 + 4))
    assert math.isnan(expected_dice(np.zeros(3)))


def test_rank_correlation_by_hand():
    assert rank_correlation([1.0, 2.0, 3.0, 9.0], [0.1, 0.5, 0.2, 0.9]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert rank_correlation([1.0, 2.0, math.nan, 3.0, 9.0], [3.0, 2.0, 9.0, 1.0, math.nan]) == -1
    assert math.isnan(rank_correlation([1.0, 2.0], [1.0, 2.0]))
    assert math.isnan(rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]))
