"""Conformal intervals against what they promise: exchangeable cases by construction, and sums by hand."""

import numpy as np
import pytest

from medseg_diff.ensemble import interval90, scaled_interval, spread
from medseg_diff.uncertainty.conformal import Volumes, cross_validated, factor, scores

VOXEL_ML = 0.001


def draw(rng: np.random.Generator, cases: int, samples: int, dispersion: float, raters: int = 1) -> list[Volumes]:
    """Skewed volumes of cases that differ; the sampler is too narrow below dispersion 1, and too wide above."""
    found = []
    for scale in rng.uniform(1, 5, cases):
        drawn = np.exp(dispersion * rng.normal(size=samples)) * scale
        found.append(Volumes(drawn, np.exp(rng.normal(size=raters)) * scale))
    return found


def held(cases: list[Volumes], stretch: float) -> float:
    intervals = [scaled_interval(case.drawn_ml, stretch, VOXEL_ML) for case in cases]
    return float(np.mean([np.mean((low <= case.references_ml) & (case.references_ml <= high))
                          for case, (low, high) in zip(cases, intervals, strict=True)]))  # fmt: skip


@pytest.mark.parametrize("dispersion", [0.3, 2.0])
@pytest.mark.parametrize("samples", [2, 16])
@pytest.mark.parametrize("n", [9, 24])
def test_the_promise_holds_for_any_sampler(dispersion, samples, n):
    """Over calibration sets and new cases: ceil(0.9 (n + 1)) / (n + 1), whatever the sampler and however many cases."""
    rng = np.random.default_rng(0)
    coverage = []
    for _ in range(150):
        cases = draw(rng, n + 5, samples, dispersion)
        stretch = factor([scores(case, VOXEL_ML) for case in cases[:n]])
        assert stretch is not None
        coverage.append(held(cases[n:], stretch))
    assert np.mean(coverage) == pytest.approx(np.ceil(0.9 * (n + 1)) / (n + 1), abs=0.03)


def test_without_the_factor_the_same_samplers_fail():
    rng = np.random.default_rng(0)
    narrow, wide = (held(draw(rng, 2000, 16, dispersion), 1.0) for dispersion in (0.3, 2.0))
    assert narrow < 0.5
    assert wide > 0.95


@pytest.mark.parametrize("raters", [2, 5])
def test_a_rater_of_a_new_case_is_held(raters):
    """Raters of a case resemble each other here, so that counting each as a case would promise too much."""
    rng = np.random.default_rng(1)
    coverage = []
    for _ in range(300):
        cases = []
        for shift in rng.normal(size=20):
            cases.append(Volumes(10 + rng.normal(size=8), 10 + 2 * shift + 0.1 * rng.normal(size=raters)))
        stretch = factor([scores(case, VOXEL_ML) for case in cases[:15]])
        assert stretch is not None
        coverage.append(held(cases[15:], stretch))
    assert 0.9 - 0.015 < np.mean(coverage) < 0.9 + 1 / 16 + 0.015


def test_a_score_by_hand():
    """Five volumes give their range: the median is 3, the ends are 2 below and 7 above; a voxel is 1."""
    case = Volumes(np.array([10.0, 2, 3, 1, 4]), np.array([3.0, 0.0, 19.0]))
    assert spread(case.drawn_ml, 1.0) == (3, 3, 8)
    assert scores(case, 1.0) == pytest.approx([0, 1, 2])
    assert scaled_interval(case.drawn_ml, 2.0, 1.0) == (0, 19), "no volume is below 0"
    assert interval90(case.drawn_ml, 20.0, 2.0, 1.0) == (0, 20), "what is reported is held"
    assert interval90(case.drawn_ml, 3.0) == (1, 10)


def test_the_factor_is_the_right_order_statistic():
    values = [np.array([float(i)]) for i in range(1, 21)]
    assert factor(values) == pytest.approx(19), "ceil(0.9 * 21)"
    assert factor(values[:9]) == pytest.approx(9)
    assert factor(values[:8]) is factor([]) is None, "it would be infinite"
    assert factor(values[:19]) == pytest.approx(18)


def test_raters_share_the_weight_of_their_case():
    """Ten cases: weight 9.9 of 11 is needed. Nine weigh 1 each; of the tenth's ten raters the ninth completes it."""
    cases = [np.array([0.5])] * 9 + [np.arange(1.0, 11)]
    assert factor(cases) == pytest.approx(9)


def test_samples_without_spread_and_absent_structures():
    same = Volumes(np.full(16, 5.0), np.array([5.0, 5.002]))
    assert scores(same, VOXEL_ML) == pytest.approx([0, 2])
    absent, invented = Volumes(np.zeros(16), np.zeros(1)), Volumes(np.full(16, 0.003), np.zeros(1))
    assert scores(absent, VOXEL_ML) == pytest.approx([0])
    assert scores(invented, VOXEL_ML) == pytest.approx([3])
    assert scaled_interval(absent.drawn_ml, 0.0, VOXEL_ML) == (0, 0)
    coverage, width = cross_validated([absent] * 20, VOXEL_ML)
    assert coverage == 1
    assert width is None, "relative to nothing"


def test_cross_validation_does_not_know_the_case():
    """One case of 12 is an outlier: nothing that was fitted without it holds it, and it stretches all other folds."""
    cases = [Volumes(np.array([1.0, 2, 3]), np.array([2.5]))] * 11
    cases.insert(4, Volumes(np.array([1.0, 2, 3]), np.array([1000.0])))
    coverage, width = cross_validated(cases, VOXEL_ML)
    assert coverage == pytest.approx(11 / 12), "fitted with it, all were held"
    assert width == pytest.approx((10 * 1000 / 2.5 + 1 / 2.5 + 1 / 1000) / 12, rel=1e-5)


def test_cross_validation_is_honest():
    rng = np.random.default_rng(2)
    found = [cross_validated(draw(rng, 30, 16, 0.3), VOXEL_ML)[0] for _ in range(40)]
    assert np.mean(found) == pytest.approx(0.92, abs=0.025), "23 of 25"


@pytest.mark.parametrize(("n", "known"), [(11, False), (12, True)])
def test_too_few_cases_to_cross_validate(n, known):
    coverage, width = cross_validated(draw(np.random.default_rng(0), n, 16, 1.0), VOXEL_ML)
    assert (coverage is not None) == (width is not None) == known
