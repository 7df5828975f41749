"""The reports that lie in a folder of results: which scans are done, and one table over all."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from medseg_diff.errors import UserError
from medseg_diff.files import replacing

ENDING = "_report.json"
TABLE = "report.csv"
COLUMNS = (
    *("scan", "value", "name", "volume_ml", "volume_ml_low90", "volume_ml_high90", "agreement"),
    *("warnings", "error"),
)


def earlier_report(path: Path, made_of: dict[str, Any]) -> dict[str, Any] | None:
    """A report that says `made_of` word for word, if all files are there that it names."""
    report = _read(path)
    if report and made_of.items() <= report.items() and all(Path(written).is_file() for written in report["written"]):
        return report
    return None


def write_table(out: Path, refused: Sequence[UserError]) -> None:
    """Writes `report.csv`: a line for every scan and label reported anywhere in `out`, and for every refused scan."""
    reports = filter(None, map(_read, sorted(out.rglob(f"*{ENDING}"))))
    lines = [line for report in reports for line in _lines(report)]
    lines += [{"scan": error.where, "error": f"{error.what}. {error.advice}"} for error in refused]
    with replacing(out / TABLE) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(lines)


def _lines(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for label in report["labels"]:
        low, high = label["volume_ml_interval90"] or (None, None)
        chosen = {column: label[column] for column in ("value", "name", "volume_ml", "agreement")}
        interval = {"volume_ml_low90": low, "volume_ml_high90": high}
        yield {"scan": report["scan"], **chosen, **interval, "warnings": "; ".join(report["warnings"])}


def _read(path: Path) -> dict[str, Any] | None:
    """None for what is no report of ours."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return report if isinstance(report, dict) and report.keys() >= {"scan", "labels", "warnings", "written"} else None
