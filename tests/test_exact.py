"""Samples against a law that is written out here."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from medseg_diff import cli
from medseg_diff.datasets.ambiguous import Factor, Truth, sample_masks
from medseg_diff.datasets.ambiguous_phantom import make_ambiguous_phantom
from medseg_diff.uncertainty.exact import exact_measures


def box(side: int) -> np.ndarray:
    mask = np.zeros((8, 8, 8), bool)
    mask[:side, :side, :side] = True
    return mask


@pytest.fixture
def truth() -> Truth:
    """An organ of 6 or 8 voxels a side, half and half, and in it a lesion of 4 a side with probability 0.25."""
    organ = Factor("organ", 1, ("tight", "wide"), np.array([0.5, 0.5]), np.stack([box(6), box(8)]))
    lesion = Factor("lesion", 2, ("absent", "there"), np.array([0.75, 0.25]), np.stack([box(0), box(4)]))
    return Truth({0: "background", 1: "organ", 2: "lesion"}, 0.001, (organ, lesion))


def test_draws_of_the_law_are_honest(truth):
    rng = np.random.default_rng(0)
    found = [
        exact_measures(truth, sample_masks(truth, 16, rng), {1: (0.0, 1.0), 2: (0.0, 0.01)}, rng) for _ in range(60)
    ]
    ged2 = np.array([measures["ged2_exact"] for measures in found])
    assert abs(ged2.mean()) < 4 * ged2.std() / np.sqrt(len(ged2)) + 0.003
    assert all(measures["implausible_exact"] == 0 for measures in found)
    expected = np.abs(np.random.default_rng(1).binomial(16, 0.25, 100_000) / 16 - 0.25).mean()
    assert np.mean([measures["presence_error"] for measures in found]) == pytest.approx(expected, abs=0.03)
    assert found[0]["coverage90_exact/organ"] == pytest.approx(1)
    assert found[0]["coverage90_exact/lesion"] == pytest.approx(0.75), "absent, or 0.064 ml"
    assert {measures["coverage90_raw_exact/lesion"] for measures in found} <= {0.25, 0.75, 1.0}


def test_certainty_is_found_out(truth):
    """The most probable mask, 16 times: without a lesion, the organ always wide."""
    certain = np.stack([box(8).astype(np.uint8)] * 16)
    found = exact_measures(truth, certain, {1: (0.5, 0.52)}, np.random.default_rng(0))
    organ = {with_lesion: (512 - 64 * with_lesion, 216 - 64 * with_lesion) for with_lesion in (0, 1)}
    across = 0.0
    for with_lesion, p in ((0, 0.75), (1, 0.25)):
        for voxels in organ[with_lesion]:
            across += p / 2 * ((1 - voxels / 512) + with_lesion) / 2
    within = 0.0
    laws = [(0.375, 512, 0), (0.375, 216, 0), (0.125, 448, 64), (0.125, 152, 64)]
    for p, a, lesion_a in laws:
        for q, b, lesion_b in laws:
            within += p * q * ((1 - min(a, b) / max(a, b)) + (lesion_a != lesion_b)) / 2
    assert found["ged2_exact"] == pytest.approx(2 * across - within, abs=0.05)
    assert found["presence_error"] == pytest.approx(0.25)
    assert found["implausible_exact"] == 0
    assert found["coverage90_exact/organ"] == pytest.approx(0.375), "0.512 ml: wide, and no lesion"
    assert found["coverage90_raw_exact/organ"] == pytest.approx(0.375)


def test_impossible_samples_are_implausible(truth):
    halves = np.stack([box(7), box(8), box(3), box(6)]).astype(np.uint8)
    found = exact_measures(truth, halves, {}, np.random.default_rng(0))
    assert found["implausible_exact"] == 0.5, "1 - IoU is 0.33 / 2 for the first and 0.9 / 2 for the third"


def test_evaluation_recognizes_an_ambiguous_phantom(tmp_path, models, monkeypatch, capsys):
    from conftest import untrained

    make_ambiguous_phantom(tmp_path / "data", 2, "mr", 2, 0)
    labels = {0: "background", 1: "organ", 2: "lesion", 3: "nodule"}
    path = untrained(tmp_path / "m.safetensors", data_spacing_mm=[1.5, 1.5, 2.0], data_size=[48, 48, 32], labels=labels)
    monkeypatch.chdir(tmp_path)
    for name, options in (("drawn", []), ("elsewhere", ["--samples", "2"])):
        model = path if name == "drawn" else untrained(tmp_path / "n.safetensors", labels=labels)
        words = ["evaluate", "--model", str(model), "--data", "data", "--split", "all", "--out", name, *options]
        monkeypatch.setattr(sys, "argv", ["medseg-diff", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
    mean = json.loads(Path("drawn/summary.json").read_text())["mean"]
    assert 0 < mean["ged2_exact"] <= 2
    assert {"implausible_exact", "presence_error", "coverage90_exact/lesion"} <= mean.keys()
    assert "ged2_exact" not in json.loads(Path("elsewhere/summary.json").read_text())["mean"]
    assert "not held against its truth" in capsys.readouterr().err
