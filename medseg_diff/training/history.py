"""Metrics of a run over its steps, kept as `metrics.csv`."""

import csv
from pathlib import Path

from medseg_diff.files import replacing


class History:
    """Rows (step, metric, value), in memory and in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[tuple[int, str, float]] = []
        if path.exists():
            with path.open(newline="") as file:
                self.rows = [(int(row["step"]), row["metric"], float(row["value"])) for row in csv.DictReader(file)]

    def add(self, metrics: dict[str, float], step: int) -> None:
        """Remembers; `save` writes."""
        self.rows += [(step, name, value) for name, value in metrics.items()]

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        with replacing(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "metric", "value"])
            writer.writerows(self.rows)

    def forget_after(self, step: int) -> None:
        """Drops what a killed run noted after the state it goes on from."""
        self.rows = [row for row in self.rows if row[0] <= step]

    def last(self, prefix: str) -> dict[str, float]:
        """The newest value of every metric whose name begins so."""
        return {name: value for _, name, value in self.rows if name.startswith(prefix)}

    def curve(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric."""
        chosen = [(step, value) for step, name, value in self.rows if name == metric]
        return [step for step, _ in chosen], [value for _, value in chosen]
