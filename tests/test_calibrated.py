"""Calibration from the validation cases into the model's file, and from there into what `segment` says."""

import json
import math
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medseg_diff.calibrated import Calibrated, IntervalFit, parse, plain, told
from medseg_diff.checkpoint import Model, describe, explain, load_model, save_model
from medseg_diff.datasets.cache import Volume, load_volumes
from medseg_diff.datasets.layouts import Case
from medseg_diff.datasets.pipeline import preprocessing
from medseg_diff.denoising import resampled
from medseg_diff.evaluate import evaluate_model
from medseg_diff.scans.read import read_scan
from medseg_diff.segment import segment_files
from medseg_diff.segmentation import segment_scan
from medseg_diff.training.validation import at_own_temperature
from medseg_diff.uncertainty.fitting import Fitting

FITTED = Calibrated(
    12, 1.5, 0.3, 0.2, samples=4, steps=1, intervals={7: IntervalFit(3.0, 0.92, 0.5), 205: IntervalFit(0.5, None, None)}
)
VOXEL_ML = 0.001


@pytest.fixture(scope="module")
def model(models) -> dict[str, Model]:
    return {name: load_model(models[name], torch.device("cpu")) for name in ("volumes", "unet", "classic")}


def calibrated(model: Model, found: Calibrated | None = FITTED) -> Model:
    return replace(model, about=replace(model.about, calibration=found))


def save(path: Path, values: np.ndarray, spacing: float = 1.0) -> Path:
    nib.save(nib.Nifti1Image(values, np.diag([spacing] * 3 + [1])), path)
    return path


@pytest.fixture
def scan(tmp_path) -> Path:
    return save(tmp_path / "knee.nii.gz", np.random.default_rng(0).normal(size=(16, 16, 16)).astype(np.float32))


@pytest.fixture
def cases(tmp_path) -> tuple[Case, ...]:
    """Twelve scans on the network's grid, and references that know nothing of them; of the first two raters."""
    rng, found = np.random.default_rng(1), []
    for index in range(12):
        paths = [tmp_path / f"{index}{end}.nii.gz" for end in ("", "_a", "_b")[: 3 if index == 0 else 2]]
        save(paths[0], rng.normal(size=(16, 16, 16)).astype(np.float32))
        for path in paths[1:]:
            values = np.zeros((16, 16, 16), np.uint8)
            values[: rng.integers(3, 14)], values[14:] = 7, 205
            save(path, values)
        found.append(Case(f"{index:02}", paths[0], tuple(paths[1:])))
    return tuple(found)


def volumes_of(model: Model, cases: tuple[Case, ...]) -> list[Volume]:
    data = model.about.config.data
    values, folder = list(model.about.labels), cases[0].image.parent / "cache"
    return load_volumes(cases, preprocessing(data), values=values, channels=1, folder=folder)


def test_draws_follow_the_temperature(model, scan):
    """As hot as it gets every class is drawn as often as any other, and at 0 nothing but the mask."""
    shares = {}
    for temperature in (1e-3, 1e3):
        found = calibrated(model["volumes"], replace(FITTED, temperature=temperature))
        drawn = segment_scan(found, read_scan(scan), samples=16, steps=1, seed=0).prediction
        counts = drawn.tally.counts.mean(0) / drawn.tally.counts.sum(1).mean()
        mask = torch.bincount(drawn.probabilities.argmax(0).flatten(), minlength=3) / 16**3
        shares[temperature] = counts, mask
    torch.testing.assert_close(*shares[1e-3], atol=0.02, rtol=0, check_dtype=False)
    torch.testing.assert_close(shares[1e3][0], torch.full((3,), 1 / 3).double(), atol=0.1, rtol=0)


def test_a_model_file_keeps_it(models, model, tmp_path):
    path, about = tmp_path / "m.safetensors", replace(model["volumes"].about, calibration=FITTED)
    save_model(path, model["volumes"].network.state_dict(), about)
    assert load_model(path, torch.device("cpu")).about == about
    held = json.loads(json.dumps(explain(path)))["calibration"]
    assert (held["temperature"], held["cases"], held["samples"], held["nominal"]) == (1.5, 12, 4, 0.9)
    assert held["intervals"]["7"] == {"factor": 3.0, "coverage": 0.92, "width": 0.5}
    assert describe(models["volumes"])[0].calibration is None
    assert explain(models["volumes"])["calibration"] == "not calibrated"


def test_it_says_what_is_not_calibrated():
    assert told(None, 4, 1) == "not calibrated"
    for samples, steps in ((8, 1), (4, 2)):
        found = told(FITTED, samples, steps)
        assert (found["intervals"], found["temperature"]) == ("not calibrated", 1.5)
        assert "nominal" not in found
    assert told(replace(FITTED, temperature=None), 4, 1)["temperature"] == "not calibrated"


def test_probabilities_soften_and_the_mask_stays(model, scan, tmp_path):
    """On the network's own grid the probabilities are those of divided logits, and every file tells of the same."""
    for name, found in (("raw", None), ("fitted", FITTED)):
        segment_files(
            [scan], calibrated(model["volumes"], found), tmp_path / name, items=["seg", "prob", "uncertainty"]
        )
    masks, probs, doubts = (
        [nib.load(tmp_path / name / f"knee_{item}.nii.gz").get_fdata() for name in ("raw", "fitted")]
        for item in ("seg", "prob", "uncertainty")
    )
    assert np.array_equal(*masks)
    expected = torch.from_numpy(probs[0]).log().div(1.5).softmax(-1).numpy()
    assert probs[1] == pytest.approx(expected, abs=1e-5)
    assert doubts[1] == pytest.approx(1 - expected.max(-1), abs=1e-5)
    assert doubts[1].mean() > doubts[0].mean() + 0.01


def test_intervals_are_stretched_around_the_median(model, scan, tmp_path):
    [raw], _ = segment_files([scan], model["volumes"], tmp_path / "raw", items=["report"])
    [fitted], _ = segment_files([scan], calibrated(model["volumes"]), tmp_path / "fitted", items=["report"])
    assert (raw["interval_nominal"], raw["calibration"]) == (0.6, "not calibrated")
    assert (fitted["interval_nominal"], fitted["calibration"]["cases"]) == (0.9, 12)
    found = segment_scan(calibrated(model["volumes"]), read_scan(scan), samples=4, steps=1, seed=0)
    for index, (label, stretch) in enumerate(zip(fitted["labels"], (3.0, 0.5), strict=True), start=1):
        drawn = np.sort(found.prediction.tally.counts[:, index].numpy()) * VOXEL_ML
        middle = (drawn[1] + drawn[2]) / 2
        low, high = (
            middle - stretch * (middle - drawn[0] + VOXEL_ML),
            middle + stretch * (drawn[3] - middle + VOXEL_ML),
        )
        reported = label["volume_ml"]
        assert label["volume_ml_interval90"] == pytest.approx((max(0, min(low, reported)), max(high, reported)))


def test_what_was_calibrated_for_other_samples_is_not_claimed(model, scan, tmp_path):
    [raw], _ = segment_files([scan], model["volumes"], tmp_path / "raw", samples=3, items=["report"])
    same = calibrated(model["volumes"], replace(FITTED, temperature=1.0))
    [other], _ = segment_files([scan], same, tmp_path / "o", samples=3, items=["report"])
    assert other["interval_nominal"] == raw["interval_nominal"] == 0.5
    assert [x["volume_ml_interval90"] for x in other["labels"]] == [x["volume_ml_interval90"] for x in raw["labels"]]
    assert other["calibration"]["intervals"] == "not calibrated"
    assert other["calibration"]["temperature"] == 1.0, "the mean head knows of no samples"


def test_intervals_are_those_of_the_sampler(model):
    fitted = replace(calibrated(model["volumes"]), path=Path("m"))
    assert resampled(fitted, sampler="ddpm").about.calibration == FITTED, "it was that already"
    other = resampled(fitted, sampler="ddim").about.calibration
    assert (other.temperature, other.factors(4, 1)) == (1.5, {})


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf, "hot"])
def test_a_header_with_an_impossible_temperature_is_refused(temperature):
    with pytest.raises(ValueError, match=r"temperature|convert"):
        parse(plain(FITTED) | {"temperature": temperature})


def test_a_fit_does_what_it_says(model, cases):
    """Evaluation of the calibrated model finds the NLL of the fit, and intervals that hold 12 of 12 and wide ones."""
    raw = evaluate_model(model["volumes"], cases, seed=0)["mean"]
    fitting = Fitting()
    warm = at_own_temperature(model["volumes"], volumes_of(model["volumes"], cases), fitting)
    tempered = evaluate_model(warm, cases, seed=0, fitting=fitting)["mean"]
    found = fitting.fit(4, 1, VOXEL_ML)
    assert (found.cases, found.samples, found.steps) == (12, 4, 1)
    after = evaluate_model(calibrated(model["volumes"], found), cases, seed=0)["mean"]
    assert raw["nll"] == pytest.approx(found.nll_before, rel=1e-4)
    assert after["nll"] == pytest.approx(found.nll_after, rel=1e-3)
    assert after["nll"] < raw["nll"] - 0.01
    for value, name in ((7, "core"), (205, "shell")):
        assert raw[f"coverage90/{name}"] < 1
        assert found.intervals[value].factor > 1
        assert after[f"coverage90/{name}"] == 1, "of 12 scores the 12th"
        assert after[f"interval_width/{name}"] > raw[f"interval_width/{name}"]
        assert found.intervals[value].coverage <= 1
        for measure in ("coverage90_raw", "width90_raw"):
            assert after[f"{measure}/{name}"] == tempered[f"{measure}/{name}"], "the samples are what they were"
        assert raw[f"width90_raw/{name}"] < raw[f"interval_width/{name}"]
    assert after["dice"] == raw["dice"]


def test_few_cases_and_other_networks(model, cases):
    """A temperature where there is a mean head, from one case on; intervals where samples are drawn, from nine on."""
    found = {}
    for name in ("volumes", "unet", "classic"):
        fitting = Fitting()
        at_own_temperature(model[name], volumes_of(model[name], cases[:1]), fitting)
        evaluate_model(model[name], cases[:1], steps=2, seed=0, fitting=fitting)
        found[name] = fitting.fit(0 if name == "unet" else 4, 2, VOXEL_ML)
    assert [found[name].temperature is None for name in found] == [False, False, True]
    assert not any(fit.intervals for fit in found.values())
    assert told(found["unet"], 0, 2)["intervals"] == told(found["volumes"], 4, 2)["intervals"] == "not calibrated"
    assert Fitting().fit(4, 1, VOXEL_ML) is None


def test_a_deterministic_model_is_tempered_too(model, scan, tmp_path):
    fitted = replace(FITTED, samples=0, intervals={})
    [report], _ = segment_files([scan], calibrated(model["unet"], fitted), tmp_path, items=["report"])
    assert report["interval_nominal"] is None
    assert report["calibration"]["temperature"] == 1.5
    assert report["calibration"]["intervals"] == "not calibrated"
