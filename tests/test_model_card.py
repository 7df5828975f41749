"""The card of the shipped model and the page of its worst cases: what they say is what was counted."""

import sys
from pathlib import Path

import numpy as np
import pytest

from medseg_diff.ensemble import LabelReport
from medseg_diff.metrics import score_masks

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import model_card
import worst_cases

NAMES = {0: "background", 1: "head", 2: "tail"}


def look(reported: np.ndarray, reference: np.ndarray, samples: np.ndarray) -> worst_cases.Look:
    labels = (
        LabelReport(1, "head", 0.5, (0.4, 0.6), 0.9, 0.8),
        LabelReport(2, "tail", 0.5, (0.001, 0.6), 0.9, None),
    )
    scores = score_masks(reported, reference, NAMES, (1.0, 1.0, 1.0))
    image = np.random.default_rng(0).normal(size=reference.shape).astype(np.float32)
    return worst_cases.Look("knee", image, np.eye(4), reference, reported, samples, labels, scores)


@pytest.fixture
def knee() -> worst_cases.Look:
    """Of 10 wrong voxels 4 take the tail for the head, 1 is added and 5 are missed; a sample has 6 of them right."""
    reference = np.zeros((12, 14, 10), np.uint8)
    reference[2:6, 2:6, 3:6], reference[2:6, 6:12, 3:6] = 1, 2
    reported = reference.copy()
    reported[2:6, 6, 4] = 1
    reported[6, 3, 4] = 1
    reported[2, 7:12, 4] = 0
    samples = np.stack([reported, reported])
    samples[1, 2:6, 6, 4] = 2
    samples[0, 2, 7:9, 4] = 2
    return look(reported, reference, samples)


def test_the_sentence_counts_errors_by_kind_and_holds_volumes_against_intervals(knee: worst_cases.Look):
    text = worst_cases.sentence(knee)
    assert "of 10 wrong voxels 40% take one label for another, 50% are missed, 10% added" in text
    assert "one sample of 2 at least is right in 60% of them" in text
    assert "head 0.50 ml (0.40 to 0.60 plausible), reference 0.05, **outside**, Dice 0.95 where 0.80 was" in text
    assert "tail 0.50 ml (0.00 to 0.60 plausible), reference 0.07, inside, Dice 0.93" in text
    right = look(knee.reference, knee.reference, knee.reference[None])
    assert "of 0 wrong voxels" in worst_cases.sentence(right)


def test_the_slice_that_is_shown_has_most_wrong_voxels(knee: worst_cases.Look, tmp_path: Path):
    view = worst_cases.worst_view(knee)
    wrong = knee.reported != knee.reference
    along = wrong.sum(tuple({0, 1, 2} - {view.axis}))
    assert along[view.slices[0]] == along.max() > 1
    worst_cases.draw([knee, knee, knee], NAMES, tmp_path / "worst.png")
    assert (tmp_path / "worst.png").stat().st_size > 10_000


def test_bootstrap_intervals_are_those_of_the_mean():
    values = np.random.default_rng(1).normal(3, 2, size=400).tolist()
    mean, low, high = model_card.bootstrap(values, np.random.default_rng(0))
    standard_error = np.std(values) / 20
    assert mean == pytest.approx(np.mean(values))
    assert low == pytest.approx(mean - 1.96 * standard_error, abs=0.02)
    assert high == pytest.approx(mean + 1.96 * standard_error, abs=0.02)


def test_a_missed_structure_has_no_distance_and_stays_in_the_dice():
    row = {"surface_dice_1mm": "0.5", "volume_error_ml": "1.0"}
    rows = [
        {"case": "a", "label": "head", "dice": "0.8", "hd95_mm": "2.0", **row},
        {"case": "b", "label": "head", "dice": "0.0", "hd95_mm": "", **row},
    ]
    head, mean = model_card.scores(rows, {"coverage90/head": 0.5})
    assert head.startswith(
        "| head | 0.400 (0.000 to 0.800) | 0.500 (0.500 to 0.500) | 2.000 (2.000 to 2.000) of 1 cases |"
    )
    assert head.endswith("| 1 of 2 (9% to 91%) |")
    assert mean.startswith("| mean over labels | 0.400")


def test_the_card_tells_whether_the_model_was_calibrated():
    assert "Nothing was calibrated" in model_card.fitted(None) == model_card.fitted("not calibrated")
    told = model_card.fitted({"temperature": 1.2, "intervals": {"1": {"factor": 1.5, "coverage": 0.9}}})
    assert "temperature: 1.2" in told
    assert "coverage: 0.9" in told
    lines = model_card.uncertainty({"nll": 0.02, "ece": None, "error_auroc": 0.98})
    assert [line.split(" | ")[1] for line in lines] == ["0.0200 |", "98.0% |"]
