"""Metrics of a run over its steps, kept as `metrics.csv`."""

import csv
from pathlib import Path

from medseg_diff.errors import UserError, reason
from medseg_diff.files import replacing


class History:
    """Values by step and metric, in memory and in a file. A step that is taken again overwrites its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[tuple[int, str], float] = {}
        if path.exists():
            try:
                with path.open(newline="", encoding="utf-8") as file:
                    rows = list(csv.DictReader(file))
                self.values = {(int(row["step"]), row["metric"]): float(row["value"]) for row in rows}
            except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
                advice = "Restore it, or start again with --fresh."
                raise UserError(path, f"it is no table of step, metric, value ({reason(error)})", advice) from error

    def add(self, metrics: dict[str, float], step: int) -> None:
        """Remembers; `save` writes."""
        self.values |= {(step, name): float(value) for name, value in metrics.items()}

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        with replacing(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "metric", "value"])
            writer.writerows((step, name, value) for (step, name), value in self.values.items())

    def forget_after(self, step: int) -> None:
        """Drops what a killed run noted after the state it goes on from."""
        self.values = {key: value for key, value in self.values.items() if key[0] <= step}

    def last(self, prefix: str) -> dict[str, float]:
        """The newest value of every metric whose name begins so."""
        return {name: value for (_, name), value in self.values.items() if name.startswith(prefix)}

    def curve(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric."""
        chosen = {step: value for (step, name), value in self.values.items() if name == metric}
        return list(chosen), list(chosen.values())
