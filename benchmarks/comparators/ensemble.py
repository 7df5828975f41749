"""A deep ensemble (Lakshminarayanan et al. 2017): U-Nets of other seeds, each trained for the whole time."""

from collections.abc import Sequence

import numpy as np

from comparators.ours import predict as predict_one
from comparators.protocol import Prediction
from medseg_diff.checkpoint import Model
from medseg_diff.datasets.cache import Volume

MEMBERS = 5


def predict(models: Sequence[Model], volume: Volume, samples: int, seed: int) -> Prediction:
    """The mean of the members' probabilities; their masks are the samples, however many were asked for."""
    soft = np.stack([predict_one(model, volume, samples, seed)[0] for model in models])
    return soft.mean(0), soft.argmax(1).astype(np.uint8)
