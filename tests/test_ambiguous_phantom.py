import filecmp
import json
from itertools import pairwise

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from medseg_diff.cli import app
from medseg_diff.datasets.ambiguous import marginals, presence, read_truth
from medseg_diff.datasets.ambiguous_phantom import SIZES, STYLES, draw_ambiguous_case, make_ambiguous_phantom
from medseg_diff.datasets.cache import load_volumes
from medseg_diff.datasets.check import check
from medseg_diff.datasets.layouts import read_dataset
from medseg_diff.datasets.phantom import make_phantom
from medseg_diff.datasets.pipeline import Preprocessing

CASES, RATERS = 24, 12


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ambiguous") / "set"
    make_ambiguous_phantom(folder, CASES, "ct", RATERS, seed=2)
    return read_dataset(folder)


def stored(path):
    return np.asarray(nib.load(path).dataobj)


@pytest.fixture(scope="module")
def truths(phantom):
    return [read_truth(case.truth) for case in phantom.cases]


@pytest.fixture(scope="module")
def drawn(phantom):
    return [np.stack([stored(path) for path in case.labels]) for case in phantom.cases]


@pytest.fixture(scope="module")
def choices(truths, drawn):
    """The option of every factor that every rater took, found by comparing masks: [cases, raters, factors]."""
    found = []
    for truth, maps in zip(truths, drawn, strict=True):
        for label_map in maps:
            row = []
            for factor in truth.factors:
                region = factor.masks.any(0) if factor.label > 1 else np.ones_like(factor.masks[0])
                shown = (label_map == factor.label) if factor.label > 1 else label_map > 0
                equal = [(shown & region == mask).all() for mask in factor.masks]
                assert sum(equal) == 1, "a rater's mask is one of the options"
                row.append(equal.index(True))
            found.append(row)
    return np.array(found).reshape(CASES, RATERS, -1)


def chi_square(counts, probabilities):
    expected = np.array(list(probabilities)) * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("modality", ["ct", "mr"])
def test_presence_is_a_line_in_the_contrast_of_the_image(modality):
    """Contrast measured anew: the core against the second layer of organ around; the line is that of the docstring."""
    low, high = {"ct": (15, 75), "mr": (0.12, 0.52)}[modality]
    contrasts, probabilities = [], []
    for seed in range(6):
        image, truth = draw_ambiguous_case(np.random.default_rng(seed), (46, 46, 23), modality)
        organ, *lesions = truth.factors
        for lesion in lesions:
            others = sum(other.masks[-1] for other in lesions if other is not lesion)
            layer = binary_dilation(lesion.masks[-1], iterations=2) & ~binary_dilation(lesion.masks[-1])
            around = image[layer & organ.masks[0] & ~binary_dilation(others)].mean(dtype=float)
            core = image[lesion.masks[1]].mean(dtype=float)
            contrasts.append(around - core if modality == "ct" else 1 - core / around)
            probabilities.append(presence(truth)[lesion.name])
    x, p = np.array(contrasts), np.array(probabilities)
    np.testing.assert_allclose(p, np.clip((x - low) / (high - low), 0, 1), atol=1e-4)
    between = (p > 0) & (p < 1)
    slope, at_zero = np.polyfit(x[between], p[between], 1)
    assert (slope, -at_zero / slope) == pytest.approx((1 / (high - low), low), rel=1e-3)
    assert np.histogram(p, [0, 0.25, 0.5, 0.75, 1])[0].min() >= 2, "clear and doubtful lesions"


def test_masks_nest_and_every_lesion_lies_in_the_tightest_organ(truths):
    for truth in truths:
        for factor in truth.factors:
            for a, b in pairwise(factor.masks):
                assert (a <= b).all()
                assert a.sum() < b.sum()
        organ, *lesions = truth.factors
        assert len(lesions) == 5
        assert np.all(sum(lesion.masks[-1].astype(int) for lesion in lesions) <= organ.masks[0])
        assert (organ.probabilities == list(STYLES.values())).all()
        _, *sizes = lesions[0].probabilities
        np.testing.assert_allclose(sizes, presence(truth)["lesion"] * np.array(list(SIZES.values())))


def test_raters_draw_styles_and_sizes_by_their_probabilities(choices):
    assert chi_square(np.bincount(choices[..., 0].ravel(), minlength=3), STYLES.values()) < 13.8, "99.9 %, 2 degrees"
    sizes = choices[..., 1][choices[..., 1] > 0]
    assert chi_square(np.bincount(sizes, minlength=4)[1:], SIZES.values()) < 13.8


def test_raters_see_each_lesion_as_often_as_its_contrast_says(choices, truths):
    p = np.array([[presence(truth)[factor.name] for factor in truth.factors[1:]] for truth in truths])
    seen = (choices[..., 1:] > 0).mean(1)
    certain = (p == 0) | (p == 1)
    np.testing.assert_array_equal(seen[certain], p[certain])
    z = (seen - p)[~certain] / np.sqrt(p * (1 - p) / RATERS)[~certain]
    assert len(z) > 90
    assert abs(z.sum()) / np.sqrt(len(z)) < 3.3, "neither too often nor too rarely"
    assert abs((z**2).mean() - 1) < 0.7, "case by case, and not only in the mean"


def test_choices_are_independent(choices):
    """Of one another and of the rater before: p is taken out case by case."""
    rest = choices - choices.mean(1, keepdims=True)
    flat = rest.reshape(-1, rest.shape[-1])
    correlation = np.corrcoef(flat[:, flat.std(0) > 0].T)
    assert np.abs(correlation - np.eye(len(correlation))).max() < 4 / np.sqrt(CASES * RATERS)


def test_frequencies_in_the_files_are_the_marginals(truths, drawn):
    worst = []
    for truth, maps in zip(truths, drawn, strict=True):
        law = marginals(truth)
        frequency = np.stack([(maps == value).mean(0) for value in truth.labels])
        assert (frequency[law == 0] == 0).all()
        worst.append(((frequency - law) ** 2).sum() / (law * (1 - law) / RATERS).sum())
    assert np.mean(worst) == pytest.approx(1, abs=0.4), "the squared error is that of so many draws"


def test_case_and_truth_depend_on_seed_and_index_alone(phantom, tmp_path):
    make_ambiguous_phantom(tmp_path / "same", 2, "ct", RATERS, seed=2)
    make_ambiguous_phantom(tmp_path / "single", 2, "ct", 1, seed=2)
    make_ambiguous_phantom(tmp_path / "other", 2, "ct", 1, seed=3)
    files = ["imagesTr/ambiguous_001.nii.gz", "truth/ambiguous_001.json"]
    for path in (*files, "labelsTr/ambiguous_001_rater5.nii.gz"):
        assert filecmp.cmp(tmp_path / "same" / path, phantom.root / path, shallow=False)
    for path in files:
        assert filecmp.cmp(tmp_path / "single" / path, phantom.root / path, shallow=False)
        assert not filecmp.cmp(tmp_path / "other" / path, phantom.root / path, shallow=False)
    assert [len(case.labels) for case in read_dataset(tmp_path / "single").cases] == [1, 1]


def test_check_finds_nothing_to_say(phantom):
    problems, contents = check(phantom.root)
    assert problems == []
    assert (contents["cases"], contents["raters"]) == (CASES, [RATERS])


@pytest.mark.parametrize("modality", ["ct", "mr"])
def test_training_takes_it_voxel_by_voxel(modality, tmp_path):
    """Nothing is resampled, so that the truth holds on the network's grid too."""
    make_ambiguous_phantom(tmp_path / "set", 2, modality, 3, seed=0)
    dataset = read_dataset(tmp_path / "set")
    how = Preprocessing((1.5, 1.5, 2.0), modality, (-160.0, 240.0), (0.5, 99.5))
    volumes = load_volumes(dataset.cases, how, values=list(dataset.labels), channels=1, folder=tmp_path)
    for volume, case in zip(volumes, dataset.cases, strict=True):
        np.testing.assert_array_equal(volume.labels.numpy(), np.stack([stored(path) for path in case.labels]))


def test_the_program_makes_it(tmp_path):
    app(["phantom", str(tmp_path / "set"), "--ambiguous", "--cases", "2", "--raters", "2"], standalone_mode=False)
    make_ambiguous_phantom(tmp_path / "called", 2, "ct", 2, seed=0)
    files = sorted(path.relative_to(tmp_path / "set") for path in (tmp_path / "set").rglob("*.*"))
    assert len(files) == 2 * (1 + 2 + 1) + 1
    assert all(filecmp.cmp(tmp_path / "set" / path, tmp_path / "called" / path, shallow=False) for path in files)


def test_only_an_ambiguous_set_has_a_truth(phantom, tmp_path):
    make_phantom(tmp_path / "plain", 2, "ct", 1, seed=0)
    assert all(case.truth is None for case in read_dataset(tmp_path / "plain").cases)
    assert json.loads((phantom.root / "dataset.json").read_text())["truth"] == "truth"
    assert phantom.cases[0].truth == phantom.root / "truth/ambiguous_000.json"
