"""Temperature scaling (Guo et al. 2017) of a trained network, fitted on validation cases other than those it serves."""

from collections.abc import Sequence
from statistics import median
from time import process_time
from typing import Any

import numpy as np
import torch

from comparators.judge import judge
from comparators.ours import predict
from comparators.protocol import Run, volumes_of
from medseg_diff.checkpoint import Model
from medseg_diff.uncertainty.temperature import TemperedLoss, tempered

FOLDS = 5


def cross_fitted(probabilities: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> list[float]:
    """A temperature for each fold; that of fold k is the best for the cases i with i % FOLDS != k."""
    found = []
    for fold in range(FOLDS):
        loss = TemperedLoss()
        for index, (p, reference) in enumerate(zip(probabilities, references, strict=True)):
            if index % FOLDS != fold:
                loss.add(torch.from_numpy(p), reference)
        found.append(loss.best()[0])
    return found


def perform(run: Run, model: Model) -> dict[str, Any]:
    """The scores of the scaled network on the validation cases."""
    config, found, seconds = model.about.config, [], []
    _, _, validation = volumes_of(run, config)
    for volume in validation:
        begun = process_time()
        found.append(predict(model, volume, 0, 0)[0])
        seconds.append(process_time() - begun)
    temperatures = cross_fitted(found, [volume.labels[0].numpy() for volume in validation])
    predictions = (
        (volume, (tempered(torch.from_numpy(p), temperatures[index % FOLDS]).numpy(), None))
        for index, (volume, p) in enumerate(zip(validation, found, strict=True))
    )
    assert config.data.spacing_mm is not None, "the shipped configurations of the hippocampus name it"
    scores = judge(predictions, model.about.labels, config.data.spacing_mm)
    return scores | {"temperatures": temperatures, "seconds_a_volume": median(seconds)}
