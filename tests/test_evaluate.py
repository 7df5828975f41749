import csv
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medseg_diff.checkpoint import Model, load_model
from medseg_diff.datasets.layouts import Case, Dataset
from medseg_diff.errors import UserError
from medseg_diff.evaluate import choose_cases, evaluate_folders, evaluate_model, logged, run_evaluation, write_summary
from medseg_diff.segment import segment_files

AFFINE = np.diag([1, 1, 3, 1.0])


@pytest.fixture(scope="module")
def model(models) -> Model:
    return load_model(models["volumes"], torch.device("cpu"))


def save(path: Path, values: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), path)
    return path


def box(shift: int = 0, value: int = 1) -> np.ndarray:
    values = np.zeros((8, 8, 8), np.uint8)
    values[2 + shift : 6 + shift, 2:6, 2:6] = value
    return values


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Five cases: both masks empty, missed, invented, shifted by a voxel, right."""
    empty = box() * 0
    pairs = {
        "both": (empty, empty), "missed": (empty, box()), "invented": (box(), empty),
        "shifted": (box(1), box()), "same": (box(), box()),
    }  # fmt: skip
    predictions, references = tmp_path / "predictions", tmp_path / "references"
    for name, (prediction, reference) in pairs.items():
        save(predictions / f"{name}_seg.nii.gz", prediction)
        save(references / f"{name}.nii.gz", reference)
    return predictions, references


def test_empty_masks_count(folders):
    summary = evaluate_folders(*folders)
    mean = summary["mean"]
    assert mean["dice"] == pytest.approx((0 + 0 + 0.75 + 1) / 4)
    assert (mean["n"], mean["n/dice/1"], mean["missed/1"], mean["invented/1"]) == (5, 4, 1, 1)
    cases = {case["name"]: case["labels"]["1"] for case in summary["cases"]}
    assert cases["both"]["dice"] is None
    assert cases["shifted"]["volume_ml"] == pytest.approx(64 * 3 / 1000)
    assert cases["shifted"]["hd95_mm"] == pytest.approx(1)


def test_summaries_hold_no_nan(folders, tmp_path):
    summary_path, cases_path = write_summary(evaluate_folders(*folders), tmp_path / "out")
    text = summary_path.read_text()
    assert "NaN" not in text
    assert json.loads(text)["mean"]["dice"] == pytest.approx(0.4375)
    with cases_path.open(newline="") as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    assert rows["both"]["dice"] == ""
    assert float(rows["same"]["dice"]) == 1


def test_a_missing_prediction_is_named(folders):
    predictions, references = folders
    (predictions / "shifted_seg.nii.gz").unlink()
    with pytest.raises(UserError, match="no mask for shifted"):
        evaluate_folders(predictions, references)


def test_what_segment_writes_beside_a_mask_is_no_mask(folders):
    predictions, references = folders
    for other in ("uncertainty", "prob", "samples"):
        save(predictions / f"same_{other}.nii.gz", np.full((8, 8, 8), 0.5, np.float32))
    save(predictions / "extra_seg.nii.gz", box())
    assert evaluate_folders(predictions, references)["mean"]["n"] == 5


@pytest.mark.parametrize(
    ("values", "affine", "word"),
    [
        (box()[:7], AFFINE, "7 x 8 x 8"),
        (box(), np.diag([1, 1, 2, 1.0]), "affine"),
        (box(), np.eye(4)[[1, 0, 2, 3]], "affine"),
    ],
)
def test_another_grid_is_refused(folders, values, affine, word):
    predictions, references = folders
    save(predictions / "same_seg.nii.gz", values, affine)
    with pytest.raises(UserError, match=word) as caught:
        evaluate_folders(predictions, references)
    assert caught.value.where == str(predictions / "same_seg.nii.gz")


@pytest.mark.parametrize("absent", ["predictions", "references"])
def test_an_absent_or_empty_folder_is_named(folders, tmp_path, absent):
    given = dict(zip(("predictions", "references"), folders, strict=True))
    with pytest.raises(UserError, match="no such folder"):
        evaluate_folders(*{**given, absent: tmp_path / "nowhere"}.values())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no label maps|no mask for"):
        evaluate_folders(*{**given, absent: tmp_path / "empty"}.values())


def test_labels_have_the_names_of_the_data_set_beside_them(tmp_path):
    for folder in ("predictions", "labelsTr"):
        save(tmp_path / folder / "a.nii.gz", box(value=7))
    save(tmp_path / "imagesTr/a.nii.gz", box())
    content = {
        "labels": {"0": "background", "7": "core"}, "modality": {"0": "MRI"},
        "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}],
    }  # fmt: skip
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    assert evaluate_folders(tmp_path / "predictions", tmp_path / "labelsTr")["mean"]["dice/core"] == 1


@pytest.fixture
def cases(tmp_path, model) -> tuple[Case, ...]:
    """The model's own masks are the references; of the first scan a second rater saw nothing."""
    found = []
    for index, name in enumerate(("a", "b")):
        values = np.random.default_rng(index).normal(size=(16, 16, 16)).astype(np.float32)
        image = save(tmp_path / f"scans/{name}.nii.gz", values, np.eye(4))
        segment_files([image], model, tmp_path / "own", samples=4, seed=index, items=["seg"])
        own = tmp_path / f"own/{name}_seg.nii.gz"
        nothing = save(tmp_path / f"nothing/{name}.nii.gz", np.zeros((16, 16, 16), np.uint8), np.eye(4))
        found.append(Case(name, image, (own, nothing) if name == "a" else (own,)))
    return tuple(found)


def test_what_is_to_be_ignored_counts_nowhere(model, cases, tmp_path):
    """A reference that is wrong in one half, and says of it that it is not known, is as good as a right one."""
    label = nib.load(cases[1].labels[0])
    values = np.asarray(label.dataobj).copy()
    values[:8] = 9
    hidden = replace(cases[1], labels=(save(tmp_path / "hidden.nii.gz", values, np.eye(4)),), ignore=9)
    mean = evaluate_model(model, [hidden], samples=4, seed=1)["mean"]
    assert (mean["dice/core"], mean["dice/shell"]) == (1, 1)
    assert "coverage90/shell" not in mean, "the volume is not known"
    assert mean["nll"] < evaluate_model(model, [replace(hidden, ignore=None)], samples=4, seed=1)["mean"]["nll"]


def test_every_rater_counts(model, cases):
    summary = evaluate_model(model, cases, samples=4, seed=0)
    assert [case["name"] for case in summary["cases"]] == ["a rater 0", "a rater 1", "b"]
    assert [case["labels"]["core"]["dice"] for case in summary["cases"]] == [1, 0, 1]
    assert summary["mean"]["dice"] == pytest.approx(2 / 3)
    assert summary["mean"]["coverage90/shell"] == pytest.approx(2 / 3)
    assert 0 < summary["mean"]["agreement/core"] < 1
    assert logged(summary)["val/dice/core"] == pytest.approx(2 / 3)
    assert all(value is not None for value in logged(summary).values())


def test_uncertainty_is_judged_as_by_hand(model, cases, tmp_path):
    """Of the second case alone, from the files that `segment` writes."""
    items = ["seg", "prob", "samples", "report"]
    [report], _ = segment_files([cases[1].image], model, tmp_path / "own", samples=4, seed=1, items=items)
    reference = np.roll(nib.load(cases[1].labels[0]).get_fdata(), 1, axis=0).astype(np.uint8)
    case = replace(cases[1], labels=(save(tmp_path / "moved.nii.gz", reference, np.eye(4)),))
    mean = evaluate_model(model, [case], samples=4, seed=1, reliability=tmp_path / "reliability.png")["mean"]

    prob, drawn = (nib.load(tmp_path / f"own/b_{item}.nii.gz").get_fdata() for item in ("prob", "samples"))
    truth = reference[..., None] == [0, 7, 205]
    right = prob.argmax(-1) == truth.argmax(-1)
    assert mean["nll"] == pytest.approx(-np.log(np.maximum(prob[truth], 1e-6)).mean(), rel=1e-4)
    assert mean["brier"] == pytest.approx(((prob - truth) ** 2).sum(-1).mean(), rel=1e-4)
    # This network is too sure in every bin, so that the gaps of the bins add up to the gap of the whole.
    assert mean["ece"] == pytest.approx(prob.max(-1).mean() - right.mean(), rel=1e-3)
    volumes, volume = (drawn == 205).sum((0, 1, 2)), (reference == 205).sum()
    spread = np.abs(volumes[:, None] - volumes).sum() / 12
    assert mean["crps/shell"] == pytest.approx((np.abs(volumes - volume).mean() - spread / 2) / volume)
    low, high = report["labels"][1]["volume_ml_interval90"]
    assert mean["interval_width/shell"] == pytest.approx((high - low) * 1000 / volume)
    ours, theirs = drawn == 205, (reference == 205)[..., None]
    iou = (ours & theirs).sum((0, 1, 2)) / (ours | theirs).sum((0, 1, 2))
    assert mean["hm_iou/shell"] == pytest.approx(iou.mean())
    assert mean["ged2/shell"] is mean["expected_dice_correlation"] is None
    assert mean["presence/shell"] == mean["reference_presence/shell"] == 1
    ranked = np.sort(prob[..., 2].ravel())[::-1]
    expected = (2 * np.cumsum(ranked) / (ranked.sum() + np.arange(1, ranked.size + 1))).max()
    assert mean["expected_dice/shell"] == report["labels"][1]["expected_dice"] == pytest.approx(expected, rel=1e-5)
    assert (tmp_path / "reliability.png").stat().st_size > 1000


def test_raters_are_a_distribution_and_cases_are_ranked(model, cases):
    """One rater of the first case saw nothing, so that the two are 1 apart."""
    first = evaluate_model(model, cases[:1], samples=4, seed=0)["mean"]
    assert first["ged2/core"] == pytest.approx(first["energy/core"] - 1)
    third = replace(cases[1], name="c", labels=cases[0].labels[1:])
    mean = evaluate_model(model, [*cases, third], samples=4, seed=0)["mean"]
    assert mean["ged2/core"] == pytest.approx(first["ged2/core"])
    assert mean["presence_brier/core"] == pytest.approx((0.25 + 0 + 1) / 3)
    assert all(-1 <= mean[f"{estimate}_correlation"] <= 1 for estimate in ("expected_dice", "agreement"))


def test_the_grid_of_the_scan_does_not_matter(model, cases, tmp_path):
    """The same voxels stored the other way round: samples and references meet on the network's grid."""
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = 15
    moved = [nib.load(path).get_fdata()[::-1] for path in (cases[1].image, cases[1].labels[0])]
    image = save(tmp_path / "flipped/b.nii.gz", moved[0].astype(np.float32), flip)
    label = save(tmp_path / "flipped/b_seg.nii.gz", moved[1].astype(np.uint8), flip)
    found, expected = (
        evaluate_model(model, [case], samples=4, seed=1)["mean"]
        for case in (Case("b", image, (label,)), cases[1])
    )  # fmt: skip
    assert expected["hm_iou/shell"] > 0.1
    assert {name: value for name, value in found.items() if value is not None} == pytest.approx(
        {name: value for name, value in expected.items() if value is not None}, rel=1e-4
    )


def test_a_deterministic_model_is_judged_by_its_probabilities(models, cases, tmp_path):
    mean = evaluate_model(load_model(models["unet"], torch.device("cpu")), cases)["mean"]
    assert 0 < mean["brier"] < 2
    assert 0 < mean["expected_dice/core"] < 1
    assert not any(name.startswith(("ged2", "crps", "coverage90")) for name in mean)
    assert mean["agreement/core"] is None


def test_a_reference_on_another_grid_is_refused(model, cases, tmp_path):
    other = save(tmp_path / "other.nii.gz", np.zeros((16, 16, 16), np.uint8), np.diag([2, 1, 1, 1.0]))
    with pytest.raises(UserError, match="affine"):
        evaluate_model(model, [replace(cases[0], labels=(other,))], samples=2)


def test_splits_are_those_of_the_model(model, tmp_path):
    labelled = tuple(Case(f"{i}", tmp_path / f"{i}", (tmp_path / "x",)) for i in range(10))
    dataset = Dataset(tmp_path, "d", model.about.labels, ("MR",), labelled, "mr")
    chosen = {which: [case.name for case in choose_cases(dataset, model, which)] for which in ("val", "train", "all")}
    assert chosen == {"val": ["0", "5"], "train": list("12346789"), "all": list("0123456789")}
    with pytest.raises(UserError, match="no such split"):
        choose_cases(dataset, model, "test")
    with pytest.raises(UserError, match="labels"):
        choose_cases(replace(dataset, labels={0: "background", 1: "core"}), model, "val")
    bare = replace(dataset, cases=tuple(replace(case, labels=()) for case in labelled))
    with pytest.raises(UserError, match="no case"):
        choose_cases(bare, model, "val")


def test_an_evaluation_is_written_and_tracked(folders, tmp_path):
    import mlflow

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    out = tmp_path / "out"
    summary = run_evaluation(None, folders, out, samples=None, steps=None, seed=0, uri=uri)
    assert sorted(path.name for path in out.iterdir()) == ["cases.csv", "summary.json"]
    [run] = mlflow.MlflowClient(uri).search_runs(
        [e.experiment_id for e in mlflow.MlflowClient(uri).search_experiments()]
    )
    assert run.data.metrics["val/dice"] == pytest.approx(summary["mean"]["dice"])
    assert run.info.status == "FINISHED"
