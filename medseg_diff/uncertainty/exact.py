"""Samples against a law that is known exactly, as that of an ambiguous phantom."""

import numpy as np
from jaxtyping import Integer

from medseg_diff.datasets.ambiguous import Truth, distances, ged_squared, possible_masks, volume_law
from medseg_diff.uncertainty.volumes import raw_interval

IMPLAUSIBLE = 0.15
"""1 - IoU, in the mean over the labels, beyond which a sample is no mask of the law."""


def exact_measures(
    truth: Truth,
    samples: Integer[np.ndarray, "samples x y z"],
    intervals_ml: dict[int, tuple[float, float]],
    rng: np.random.Generator,
) -> dict[str, float]:
    """What a case's samples, label maps on the grid of its truth, are worth. Never read the first number alone.

    - ged2_exact: squared generalized energy distance to the law, without bias; 0 for draws of the law.
    - implausible_exact: share of the samples that are further than IMPLAUSIBLE from every mask that can occur.
    - presence_error: |share of samples that hold a structure - its probability|, mean over those that may be absent.
    - coverage90_exact/LABEL: the probability that a volume of the law lies in the label's interval.
    - coverage90_raw_exact/LABEL: the same of the interval between the samples' own quantiles at 5 and 95 %.
    """
    values = [value for value in truth.labels if value]
    possible = np.stack([mask for _, mask in possible_masks(truth)])
    errors = []
    for factor in truth.factors:
        there = factor.masks.any((1, 2, 3))
        if not there.all():
            held = (samples == factor.label)[:, factor.masks.any(0)].any(1)
            errors.append(abs(held.mean() - factor.probabilities[there].sum()))
    found = {
        "ged2_exact": ged_squared(truth, samples, rng)[0],
        "implausible_exact": float((distances(samples, possible, values).min(1) > IMPLAUSIBLE).mean()),
        "presence_error": float(np.mean(errors)) if errors else float("nan"),
    }
    for value, interval in intervals_ml.items():
        volumes_ml, law = volume_law(truth, value)
        raw = raw_interval((samples == value).sum((1, 2, 3)) * truth.voxel_ml)
        for name, (low, high) in (("coverage90_exact", interval), ("coverage90_raw_exact", raw)):
            inside = (low <= volumes_ml + 1e-9) & (volumes_ml - 1e-9 <= high)
            found[f"{name}/{truth.labels[value]}"] = float(law[inside].sum())
    return found
