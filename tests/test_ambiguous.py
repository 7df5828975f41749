from itertools import pairwise

import numpy as np
import pytest

from medseg_diff.datasets.ambiguous import (
    Factor,
    Truth,
    compose,
    ged_squared,
    marginals,
    possible_masks,
    presence,
    read_truth,
    sample_masks,
    volume_law,
    write_truth,
)
from medseg_diff.errors import UserError

SHAPE = (6, 5, 4)
ORGAN, LESION = {0: "background", 1: "organ", 5: "lesion"}, 5


def block(*sizes):
    mask = np.zeros(SHAPE, bool)
    mask[tuple(slice(0, n) for n in sizes)] = True
    return mask


def law():
    """An organ in two styles, a lesion in two sizes, a second lesion: 12 masks."""
    second = np.zeros(SHAPE, bool)
    second[3, 3, 2] = True
    nothing = np.zeros(SHAPE, bool)
    return Truth(
        ORGAN,
        0.5,
        (
            Factor("organ", 1, ("tight", "wide"), np.array([0.3, 0.7]), np.stack([block(4, 4, 3), block(6, 5, 4)])),
            Factor(
                "lesion",
                LESION,
                ("absent", "small", "large"),
                np.array([0.5, 0.2, 0.3]),
                np.stack([nothing, block(1, 1, 1), block(2, 2, 1)]),
            ),
            Factor("second", LESION, ("absent", "present"), np.array([0.9, 0.1]), np.stack([nothing, second])),
        ),
    )


def test_masks_can_be_counted_by_hand():
    masks = list(possible_masks(law()))
    assert len(masks) == 2 * 3 * 2
    assert sum(p for p, _ in masks) == pytest.approx(1)
    assert sorted(p for p, _ in masks)[0] == pytest.approx(0.3 * 0.2 * 0.1)
    choice = compose(law(), np.array([0, 2, 1]))
    assert [(choice == value).sum() for value in (1, LESION)] == [48 - 5, 5]


def test_marginals_and_presence_are_sums_over_the_masks():
    truth, masks = law(), list(possible_masks(law()))
    for value, probability in zip(truth.labels, marginals(truth), strict=True):
        np.testing.assert_allclose(probability, sum(p * (mask == value) for p, mask in masks), atol=1e-12)
    assert presence(truth) == pytest.approx({"organ": 1, "lesion": 0.5, "second": 0.1})


@pytest.mark.parametrize("label", [1, LESION])
def test_volumes_are_those_of_the_masks(label):
    truth = law()
    summed = {}
    for p, mask in possible_masks(truth):
        volume = (mask == label).sum() * 0.5
        summed[volume] = summed.get(volume, 0) + p
    volumes, probabilities = volume_law(truth, label)
    assert volumes.tolist() == sorted(summed)
    np.testing.assert_allclose(probabilities, [summed[volume] for volume in volumes])


def test_draws_follow_the_law_of_whole_masks():
    """Chi-square over the 12 masks, so that factors are drawn independently too."""
    truth, n = law(), 20_000
    drawn = sample_masks(truth, n, np.random.default_rng(0))
    found = {mask.tobytes(): 0 for mask in drawn}
    for mask in drawn:
        found[mask.tobytes()] += 1
    expected = {mask.tobytes(): n * p for p, mask in possible_masks(truth)}
    assert found.keys() <= expected.keys()
    chi_square = sum((found.get(key, 0) - e) ** 2 / e for key, e in expected.items())
    assert chi_square < 31.3, "the 99.9 % quantile with 11 degrees of freedom"
    error = np.abs(np.stack([(drawn == value).mean(0) for value in truth.labels]) - marginals(truth))
    assert error.max() < 4.5 * 0.5 / np.sqrt(n)


def exact_ged_squared(truth, draws):
    """By enumeration of the law, with sets of voxels in place of matrices."""

    def distance(a, b):
        total = 0.0
        for value in (1, LESION):
            x, y = ({tuple(v) for v in np.argwhere(mask == value)} for mask in (a, b))
            total += 1 - len(x & y) / len(x | y) if x | y else 0.0
        return total / 2

    masks = list(possible_masks(truth))
    across = np.mean([sum(p * distance(s, y) for p, y in masks) for s in draws])
    true = sum(p * q * distance(y, z) for p, y in masks for q, z in masks)
    within = np.mean([distance(s, z) for i, s in enumerate(draws) for j, z in enumerate(draws) if i != j])
    return 2 * across - within - true


def test_ged_squared_equals_enumeration_within_its_error():
    truth, rng = law(), np.random.default_rng(1)
    draws = sample_masks(truth, 6, rng)
    estimate, error = ged_squared(truth, draws, rng, samples=4096)
    assert 0 < error < 0.02
    assert estimate == pytest.approx(exact_ged_squared(truth, draws), abs=4 * error)


def test_the_law_itself_has_no_distance_and_the_likeliest_mask_has():
    truth, rng = law(), np.random.default_rng(2)
    of_law = [ged_squared(truth, sample_masks(truth, 16, rng), rng)[0] for _ in range(40)]
    assert abs(np.mean(of_law)) < 4 * np.std(of_law) / np.sqrt(40)
    likeliest = max(possible_masks(truth), key=lambda pair: pair[0])[1]
    assert ged_squared(truth, np.stack([likeliest] * 16), rng)[0] > 0.15
    with pytest.raises(ValueError, match="2 draws or more"):
        ged_squared(truth, likeliest[None], rng)


def test_a_truth_is_read_as_it_was_written(tmp_path):
    write_truth(law(), tmp_path / "case.json")
    read = read_truth(tmp_path / "case.json")
    assert (read.labels, read.voxel_ml) == (ORGAN, 0.5)
    for a, b in zip(law().factors, read.factors, strict=True):
        assert (a.name, a.label, a.options) == (b.name, b.label, b.options)
        np.testing.assert_array_equal(a.probabilities, b.probabilities)
        np.testing.assert_array_equal(a.masks, b.masks)


def test_a_file_that_is_no_truth_is_refused(tmp_path):
    for content in ("{", "[]", '{"shape": [1, 1, 1]}'):
        (tmp_path / "case.json").write_text(content)
        with pytest.raises(UserError, match="no truth"):
            read_truth(tmp_path / "case.json")
    with pytest.raises(UserError, match="no truth"):
        read_truth(tmp_path / "absent.json")


def test_masks_that_overlap_or_leave_the_organ_are_refused():
    organ, lesion, second = law().factors
    outside = Factor("lesion", LESION, ("absent", "present"), np.array([0.5, 0.5]), np.stack([block(0), block(6, 1)]))
    for factors in ((organ, lesion, lesion), (organ, outside)):
        with pytest.raises(ValueError, match="overlap"):
            Truth(ORGAN, 0.5, factors)
    assert all((a <= b).all() for a, b in pairwise(organ.masks))
    assert Truth(ORGAN, 0.5, (organ, second))
