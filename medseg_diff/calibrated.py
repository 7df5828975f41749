"""What was fitted on held-out cases and is kept in the model's file."""

import math
from dataclasses import asdict, dataclass
from typing import Any

NOMINAL = 0.9
"""The share of volumes that calibrated intervals promise to hold."""


@dataclass(frozen=True)
class IntervalFit:
    """How far the intervals of a label's volume are stretched around the median, see `uncertainty.conformal`.

    `coverage` and `width`, relative to the reference's volume, are those of cases that the factor was not fitted on, by
    cross-validation; null of too few cases, `width` also where no reference holds the label.
    """

    factor: float
    coverage: float | None
    width: float | None


@dataclass(frozen=True)
class Calibrated:
    """Fits on `cases` held-out cases.

    Attributes:
        temperature: of the mean head, with the NLL in nats before and after; null of a network without one.
        samples, steps: what the intervals were fitted on, and hold for.
        intervals: by label value; empty where there are no samples or too few cases.

    """

    cases: int
    temperature: float | None
    nll_before: float | None
    nll_after: float | None
    samples: int
    steps: int
    intervals: dict[int, IntervalFit]

    def factors(self, samples: int, steps: int) -> dict[int, float]:
        """By label value, for intervals of so many samples in so many steps; empty where these were not calibrated."""
        fits = self.intervals if (samples, steps) == (self.samples, self.steps) else {}
        return {value: fit.factor for value, fit in fits.items()}


def plain(found: Calibrated | None) -> dict[str, Any] | None:
    """As values that JSON can hold."""
    if found is None:
        return None
    return asdict(found) | {"intervals": {str(value): asdict(fit) for value, fit in found.intervals.items()}}


def parse(held: dict[str, Any] | None) -> Calibrated | None:
    """What `plain` gave. Raises TypeError, ValueError or KeyError for anything else."""
    if held is None:
        return None
    intervals = {int(value): IntervalFit(**fit) for value, fit in held["intervals"].items()}
    temperature = held["temperature"]
    if temperature is not None and not 0 < float(temperature) < math.inf:
        raise ValueError(f"a temperature of {temperature}")
    return Calibrated(**held | {"intervals": intervals})


def told(found: Calibrated | None, samples: int | None = None, steps: int | None = None) -> dict[str, Any] | str:
    """For people, and of intervals from so many samples in so many steps: what is calibrated, and what is not."""
    values = plain(found)
    if found is None or values is None:
        return "not calibrated"
    if found.temperature is None:
        values["temperature"] = "not calibrated"
    if found.factors(samples or found.samples, steps or found.steps):
        return values | {"nominal": NOMINAL}
    return values | {"intervals": "not calibrated"}
