import csv
import dataclasses
import json
import math

import numpy as np
import pytest
from scipy.ndimage import binary_erosion, distance_transform_edt

from medseg_diff.metrics import label_keys, score_masks, summarize, table, write_cases_csv

NAMES = {0: "background", 1: "organ"}
SPACING_MM = (1.0, 1.0, 3.0)


def box(x, y, z, shape=(12, 12, 12), value=1, dtype=np.uint8):
    mask = np.zeros(shape, dtype)
    mask[slice(*x), slice(*y), slice(*z)] = value
    return mask


def score(prediction, reference, spacing_mm=SPACING_MM):
    return score_masks(prediction, reference, NAMES, spacing_mm)[1]


def test_cube_moved_along_x():
    s = score(box((3, 7), (2, 6), (2, 6)), box((2, 6), (2, 6), (2, 6)))
    assert (s.tp, s.fp, s.fn) == (48, 16, 16)
    assert s.dice == pytest.approx(0.75)
    assert s.iou == pytest.approx(48 / 80)
    assert s.hd95_mm == 1
    # Of the 56 surface voxels of a cube, 20 lie outside the other's surface: 16 of the face ahead, 4 inside the other.
    assert s.asd_mm == pytest.approx(20 / 56)
    assert s.surface_dice_1mm == 1
    assert s.volume_ml == s.reference_ml == pytest.approx(0.192)
    assert s.volume_error_ml == 0


def test_distances_are_in_mm():
    a, b = box((2, 6), (2, 6), (3, 7)), box((2, 6), (2, 6), (2, 6))
    s = score(a, b)
    assert s.hd95_mm == 3
    # The face ahead is 3 mm away; the 4 voxels inside the other are 1 mm from its sides.
    assert s.asd_mm == pytest.approx((16 * 3 + 4 * 1) / 56)
    assert 0.5 < s.surface_dice_1mm < 1
    assert score(a, b, (1.0, 1.0, 1.0)).surface_dice_1mm == 1


@pytest.mark.parametrize(("axis", "distance_mm"), [(0, 0.7), (1, 2.0), (2, 5.0)])
def test_single_voxels(axis, distance_mm):
    a = box((4, 5), (4, 5), (4, 5))
    s = score(np.roll(a, 1, axis), a, (0.7, 2.0, 5.0))
    assert (s.tp, s.fp, s.fn, s.dice) == (0, 1, 1, 0)
    assert s.hd95_mm == pytest.approx(distance_mm)
    assert s.asd_mm == pytest.approx(distance_mm)
    assert s.volume_ml == pytest.approx(0.007)
    # The faces that touch coincide; all else is farther than 1 mm unless the voxels are.
    assert s.surface_dice_1mm == (1 if distance_mm < 1 else pytest.approx(0.5))


def test_ball_and_its_shell():
    radius = np.linalg.norm(np.indices((31, 31, 31)) - 15, axis=0)
    ball, shell = (radius <= 10).astype(np.uint8), ((radius <= 10) & (radius > 7)).astype(np.uint8)
    s = score(shell, ball, (1.0, 1.0, 1.0))
    assert s.fp == 0
    assert s.fn == (radius <= 7).sum()
    assert s.dice == pytest.approx(2 * shell.sum() / (shell.sum() + ball.sum()))
    assert s.volume_error_ml == pytest.approx((radius <= 7).sum() / 1000)
    # The shell's inner surface, 7 of 10 in radius and so half of 100 in area, is some 3 mm from the ball's surface.
    assert s.surface_dice_1mm == pytest.approx(200 / 249, abs=0.02)
    assert 2 < s.hd95_mm < 4


def test_one_slice_is_scored_as_a_picture():
    a, b = (box(x, (4, 12), (0, 1), (20, 20, 1)) for x in ((4, 12), (6, 14)))
    # Outline of a square of 8: 28 straight pieces and 4 corners of length sqrt(1/2). Moved by 2 mm, 7 pieces on each
    # side along the motion stay within 1 mm, and across it the two pieces and two corners next to those sides.
    corner = math.sqrt(0.5)
    s = score(a, b, (1.0, 1.0, 7.0))
    assert s.surface_dice_1mm == pytest.approx((16 + 2 * corner) / (28 + 4 * corner))
    for axis, spacing_mm in enumerate([(7.0, 1.0, 1.0), (1.0, 7.0, 1.0)]):
        turned = score(np.moveaxis(a, 2, axis), np.moveaxis(b, 2, axis), spacing_mm)
        assert dataclasses.astuple(turned) == dataclasses.astuple(s)


def test_a_mask_at_the_border_has_its_surface_there():
    a = np.ones((5, 5, 5), np.uint8)
    s = score(a, box((0, 5), (0, 5), (0, 4), (5, 5, 5)))
    inside = score(box((3, 8), (3, 8), (3, 8)), box((3, 8), (3, 8), (3, 7)))
    assert dataclasses.astuple(s) == dataclasses.astuple(inside)


def test_surface_tolerance_forgives_a_float32_spacing():
    a = box((2, 6), (2, 6), (2, 6))
    assert score(np.roll(a, 1, 0), a, (1.0000001, 1.0, 1.0)).surface_dice_1mm == 1
    assert score(np.roll(a, 1, 0), a, (1.01, 1.0, 1.0)).surface_dice_1mm < 1


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
def test_labels_are_scored_apart(dtype):
    names = {0: "background", 2: "left", 300 if dtype != np.uint8 else 30: "right"}
    low, high = list(names)[1:]
    reference = box((1, 4), (1, 4), (1, 4), value=low, dtype=dtype) + box(
        (6, 9), (6, 9), (6, 9), value=high, dtype=dtype
    )
    prediction = np.where(reference == high, low, reference).astype(dtype)
    scores = score_masks(prediction, reference, names, SPACING_MM)
    assert list(scores) == [low, high]
    assert scores[low].dice == pytest.approx(2 * 27 / (27 + 54))
    assert scores[high].dice == 0
    assert scores[high].missed
    assert not scores[low].missed


def test_against_distance_transforms():
    rng = np.random.default_rng(0)
    noise = np.cumsum(np.cumsum(rng.normal(size=(2, 20, 22, 14)), 1), 2)
    p, r = (noise > np.quantile(noise, 0.7)).astype(np.uint8)
    edges = [np.pad(m, 1) ^ binary_erosion(np.pad(m, 1)) for m in (p, r)]
    spacing_mm = (0.8, 1.3, 2.5)
    directed = [distance_transform_edt(edges[1 - i] == 0, sampling=spacing_mm)[edges[i].astype(bool)] for i in (0, 1)]
    s = score(p, r, spacing_mm)
    assert s.hd95_mm == pytest.approx(max(np.percentile(d, 95) for d in directed), rel=1e-5)
    assert s.asd_mm == pytest.approx(np.concatenate(directed).mean(), rel=1e-5)


def test_against_monai_on_the_whole_image():
    import torch
    from monai.metrics import compute_dice, compute_hausdorff_distance, compute_iou, compute_surface_dice

    p, r = box((20, 33), (11, 20), (7, 19), (60, 50, 40)), box((22, 30), (13, 25), (8, 21), (60, 50, 40))
    p[50, 40, 30] = 1
    masks = [torch.from_numpy(m).bool()[None, None] for m in (p, r)]
    s = score(p, r)
    assert s.dice == pytest.approx(compute_dice(*masks).item())
    assert s.iou == pytest.approx(compute_iou(*masks).item())
    hausdorff = compute_hausdorff_distance(*masks, include_background=True, percentile=95, spacing=SPACING_MM)
    assert s.hd95_mm == pytest.approx(hausdorff.item())
    surface = compute_surface_dice(*masks, [1.0], include_background=True, spacing=SPACING_MM, use_subvoxels=True)
    assert s.surface_dice_1mm == pytest.approx(surface.item())


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(12, 12, 12\).*\(8, 8, 8\)"):
        # Past jaxtyping's check, which users do not have.
        score_masks.__wrapped__(np.zeros((12, 12, 12), int), np.zeros((8, 8, 8), int), NAMES, SPACING_MM)


@pytest.fixture(scope="module")
def summary():
    empty, cube = np.zeros((8, 8, 8), np.uint8), box((2, 6), (2, 6), (2, 6), (8, 8, 8))
    pairs = {
        "both empty": (empty, empty),
        "missed": (empty, cube),
        "invented": (cube, empty),
        "moved": (np.roll(cube, 1, 0), cube),
        "same": (cube, cube),
    }
    cases = {name: score_masks(*pair, NAMES, SPACING_MM) for name, pair in pairs.items()}
    return summarize(cases, NAMES)


def test_empty_masks_count(summary):
    mean = summary["mean"]
    assert mean["dice"] == mean["dice/organ"] == pytest.approx((0 + 0 + 0.75 + 1) / 4)
    assert mean["surface_dice_1mm"] == pytest.approx((0 + 0 + 1 + 1) / 4)
    assert mean["hd95_mm"] == pytest.approx((1 + 0) / 2)
    assert mean["volume_error_ml"] == pytest.approx((0 + 0.192 + 0.192 + 0 + 0) / 5)
    assert (mean["n"], mean["n/dice/organ"], mean["n/hd95_mm/organ"]) == (5, 4, 2)
    assert (mean["missed/organ"], mean["invented/organ"]) == (1, 1)
    labels = {case["name"]: case["labels"]["organ"] for case in summary["cases"]}
    assert labels["both empty"]["dice"] is labels["missed"]["hd95_mm"] is labels["invented"]["asd_mm"] is None
    assert labels["missed"]["missed"]
    assert not labels["invented"]["missed"]
    assert "NaN" not in json.dumps(summary)


def test_the_mean_is_over_labels():
    names = {1: "a", 2: "b", 3: "nowhere"}
    one, both = box((1, 3), (1, 3), (1, 3)), box((1, 3), (1, 3), (1, 3))
    both[6:8, 6:8, 6:8] = 2
    cases = {"1": score_masks(one, one, names, SPACING_MM), "2": score_masks(one, both, names, SPACING_MM)}
    mean = summarize(cases, names)["mean"]
    assert (mean["dice/a"], mean["dice/b"], mean["dice/nowhere"]) == (1, 0, None)
    assert mean["dice"] == 0.5
    assert mean["n/dice/b"] == 1


def test_no_cases():
    summary = summarize({}, NAMES)
    assert summary["mean"]["dice"] is None
    assert summary["mean"]["n"] == 0
    assert "0 of 0" in table(summary)


def test_label_names_suit_mlflow():
    from mlflow.utils.validation import _validate_metric_name

    names = {0: "background", 1: "left/right", 2: "Tumör (T2)", 3: "..", 4: "a+b", 5: "a*b", 6: "", 7: "left kidney"}
    keys = label_keys(names)
    assert keys[1] == "left_right"
    assert keys[7] == "left kidney"
    assert list(keys) == [1, 2, 3, 4, 5, 6, 7]
    assert len(set(keys.values())) == 7
    for key in keys.values():
        _validate_metric_name(f"val/dice/{key}")


def test_cases_csv(summary, tmp_path):
    write_cases_csv(summary, tmp_path / "cases.csv")
    with (tmp_path / "cases.csv").open(newline="") as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["both empty", "missed", "invented", "moved", "same"]
    assert rows["both empty"]["dice"] == rows["missed"]["hd95_mm"] == ""
    assert float(rows["moved"]["dice"]) == 0.75
    assert rows["missed"]["missed"] == "True"


def test_table_counts(summary):
    lines = table(summary).splitlines()
    assert lines[0].split()[:3] == ["label", "Dice", "IoU"]
    row = lines[1].split()
    assert row[:2] == ["organ", "0.438"]
    assert "4 of 5" in lines[1]
    assert "2 of 5" in lines[1]
    assert row[-2:] == ["1", "1"]
    assert max(map(len, lines)) <= 130
