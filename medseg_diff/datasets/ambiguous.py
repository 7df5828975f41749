"""The law of the masks of an ambiguous scan, known exactly: independent choices whose masks compose.

A case's truth is a JSON file. It names the shape of the grid, the volume of a voxel, the labels, and the factors: each
has a label and options with their probabilities. The mask of an option is kept as `edges`: the flat places, in C order
over the axes of the files, where it alternately begins and ends.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Integer, UInt8

from medseg_diff.errors import UserError

BLOCKS = 8
"""Of masks drawn from the truth: their scatter is the error of ged_squared."""


@dataclass(frozen=True)
class Factor:
    """A choice, independent of the others: `label` fills `masks[i]` with `probabilities[i]`. Absent: an empty mask."""

    name: str
    label: int
    options: tuple[str, ...]
    probabilities: Float64[np.ndarray, "options"]
    masks: Bool[np.ndarray, "options x y z"]


@dataclass(frozen=True)
class Truth:
    """The law of a case's masks.

    The masks of the first factor, the organ, hold those of all others, and no two of the others touch the same voxel;
    so volumes add up. Raises ValueError where they do not.
    """

    labels: dict[int, str]
    voxel_ml: float
    factors: tuple[Factor, ...]

    def __post_init__(self) -> None:
        within = sum(factor.masks.any(0).astype(int) for factor in self.factors[1:])
        if (within > self.factors[0].masks.all(0)).any():
            raise ValueError(
                "the masks of the later factors overlap, or leave the first; draw them apart, and inside it"
            )


def compose(truth: Truth, choice: Integer[np.ndarray, "factors"]) -> UInt8[np.ndarray, "x y z"]:
    """The label map of one choice of an option for every factor."""
    label_map = np.zeros(truth.factors[0].masks.shape[1:], np.uint8)
    for factor, option in zip(truth.factors, choice, strict=True):
        label_map[factor.masks[option]] = factor.label
    return label_map


def sample_masks(truth: Truth, n: int, rng: np.random.Generator) -> UInt8[np.ndarray, "n x y z"]:
    """Independent draws of the law, as those of raters are."""
    choices = [rng.choice(len(factor.options), n, p=factor.probabilities) for factor in truth.factors]
    return np.stack([compose(truth, choice) for choice in np.transpose(choices)])


def possible_masks(truth: Truth) -> Iterator[tuple[float, UInt8[np.ndarray, "x y z"]]]:
    """Every mask that can occur, with its probability: as many as the product of the numbers of options."""
    for choice in product(*(range(len(factor.options)) for factor in truth.factors)):
        probability = prod(factor.probabilities[i] for factor, i in zip(truth.factors, choice, strict=True))
        if probability:
            yield float(probability), compose(truth, np.array(choice))


def marginals(truth: Truth) -> Float64[np.ndarray, "classes x y z"]:
    """The probability of every class at every voxel, in the order of `truth.labels`."""
    values = list(truth.labels)
    law = np.zeros((len(values), *truth.factors[0].masks.shape[1:]))
    law[0] = 1
    for factor in truth.factors:
        covered = np.tensordot(factor.probabilities, factor.masks, axes=1)
        law *= 1 - covered
        law[values.index(factor.label)] += covered
    return law


def presence(truth: Truth) -> dict[str, float]:
    """The probability that a factor's structure is there at all, by the factor's name."""
    return {f.name: float(f.probabilities[f.masks.any((1, 2, 3))].sum()) for f in truth.factors}


def volume_law(truth: Truth, label: int) -> tuple[Float64[np.ndarray, "volumes"], Float64[np.ndarray, "volumes"]]:
    """The volumes in ml that a label can have, ascending, and their probabilities; a volume of 0 is its absence."""
    voxels: np.ndarray = np.zeros(1, int)
    law: np.ndarray = np.ones(1)
    for factor in truth.factors:
        if label not in (factor.label, truth.factors[0].label):
            continue
        sign = 1 if factor.label == label else -1  # what lies in the organ takes voxels from it
        sizes = sign * factor.masks.sum((1, 2, 3))
        voxels, places = np.unique(np.add.outer(voxels, sizes), return_inverse=True)
        law = np.bincount(places.ravel(), np.outer(law, factor.probabilities).ravel())
    return voxels[law > 0] * truth.voxel_ml, law[law > 0]


def ged_squared(
    truth: Truth, draws: Integer[np.ndarray, "n x y z"], rng: np.random.Generator, samples: int = 512
) -> tuple[float, float]:
    """Squared generalized energy distance of n >= 2 drawn masks to the law, and the standard error of its estimate.

    2 E d(s, y) - E d(s, s') - E d(y, y'), where d is 1 - IoU in the mean over the labels (0 for a label that both lack)
    and the pairs are of different masks, so that draws of the law itself have 0 in the mean, and are below it at times.
    y are `samples` draws of the law in 8 blocks; the error is that of these, over the blocks, and not of the n draws.
    Székely & Rizzo 2013, J. Stat. Plan. Inference 143; Kohl et al. 2018, arXiv:1806.05034.
    """
    if len(draws) < 2 or samples < 2 * BLOCKS:
        raise ValueError(f"give 2 draws or more and {2 * BLOCKS} samples or more, not {len(draws)} and {samples}")
    values = [value for value in truth.labels if value]
    within = _mean_of_pairs(distances(draws, draws, values))
    estimates = []
    for _ in range(BLOCKS):
        true = sample_masks(truth, samples // BLOCKS, rng)
        across = distances(draws, true, values).mean()
        estimates.append(2 * across - within - _mean_of_pairs(distances(true, true, values)))
    return float(np.mean(estimates)), float(np.std(estimates, ddof=1) / np.sqrt(BLOCKS))


def read_truth(path: Path) -> Truth:
    """Raises UserError for a file that is none."""
    try:
        content = json.loads(path.read_text())
        shape = tuple(content["shape"])
        factors = tuple(
            Factor(
                factor["name"],
                factor["label"],
                tuple(option["name"] for option in factor["options"]),
                np.array([float(option["probability"]) for option in factor["options"]]),
                np.stack([_filled(option["edges"], shape) for option in factor["options"]]),
            )
            for factor in content["factors"]
        )
        return Truth({int(value): name for value, name in content["labels"].items()}, content["voxel_ml"], factors)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(path, f"it is no truth of an ambiguous phantom ({error})", "Make the data set anew.") from error


def write_truth(truth: Truth, path: Path) -> None:
    """The same bytes for the same truth."""
    factors = [
        {
            "name": factor.name,
            "label": factor.label,
            "options": [
                {"name": name, "probability": float(p), "edges": np.flatnonzero(_changes(mask)).tolist()}
                for name, p, mask in zip(factor.options, factor.probabilities, factor.masks, strict=True)
            ],
        }
        for factor in truth.factors
    ]
    shape = truth.factors[0].masks.shape[1:]
    content = {"shape": shape, "voxel_ml": truth.voxel_ml, "labels": truth.labels, "factors": factors}
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n")


def _changes(mask: Bool[np.ndarray, "x y z"]) -> Int[np.ndarray, "places"]:
    return np.diff(mask.ravel().astype(int), prepend=0, append=0)


def _filled(edges: list[int], shape: tuple[int, ...]) -> Bool[np.ndarray, "x y z"]:
    return (np.bincount(np.array(edges, int), minlength=prod(shape) + 1).cumsum()[:-1] % 2 == 1).reshape(shape)


def distances(
    a: Integer[np.ndarray, "n x y z"], b: Integer[np.ndarray, "m x y z"], values: list[int]
) -> Float[np.ndarray, "n m"]:
    """1 - IoU of every mask of a with every mask of b, in the mean over the labels `values`; 0 where both lack one."""
    total = np.zeros((len(a), len(b)))
    for value in values:
        in_a, in_b = ((masks.reshape(len(masks), -1) == value).astype(np.float32) for masks in (a, b))
        both = in_a @ in_b.T
        either = in_a.sum(1)[:, None] + in_b.sum(1) - both
        total += np.where(either > 0, 1 - both / np.maximum(either, 1), 0)
    return total / len(values)


def _mean_of_pairs(distances: Float[np.ndarray, "n n"]) -> float:
    """Over pairs of different masks."""
    n = len(distances)
    return float((distances.sum() - np.trace(distances)) / (n * (n - 1)))
