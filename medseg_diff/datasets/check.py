"""Every problem of a data set or a scan at once, and what a data set holds."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from jaxtyping import Int

from medseg_diff.config_file import parse_config
from medseg_diff.console import progress
from medseg_diff.datasets.description import is_dataset
from medseg_diff.datasets.fingerprint import Contents, contents_of, fingerprint, proposal
from medseg_diff.datasets.layouts import Case, Dataset, survey, twins
from medseg_diff.datasets.reading import check_values, read_case
from medseg_diff.errors import UserError
from medseg_diff.files import replacing
from medseg_diff.scans.find import find_scans
from medseg_diff.scans.geometry import check_same_grid
from medseg_diff.scans.read import Scan, read_label_map, read_scan

UNUSUAL_SPACING = 3.0  # times the median, or a part of it


@dataclass(frozen=True)
class Problem:
    """Where, what, and what to do; an error keeps the program from trusting the file, a warning does not."""

    where: str
    what: str
    advice: str
    level: Literal["error", "warning"] = "error"


def check(path: Path) -> tuple[list[Problem], dict[str, Any] | None]:
    """Every problem of a data set (see data/README.md) or of scans; none where all is well.

    With them, of a data set without errors, its `fingerprint` and, as `configuration`, the `proposal` for it.
    """
    if is_dataset(path):
        return _check_dataset(path)
    try:
        scans = [scan.path for scan in find_scans([path])]
    except UserError as error:
        return [_problem(error)], None
    problems = []
    with progress("checking", len(scans)) as advance:
        for scan in scans:
            try:
                problems += _warnings(read_scan(scan))
            except UserError as error:
                problems.append(_problem(error))
            advance()
    return _gathered(problems), None


def write_config(contents: dict[str, Any] | None, path: Path) -> None:
    """Writes what `check` proposes as a configuration. Raises UserError where there is nothing to propose."""
    if contents is None:
        raise UserError(path, "it is not written: it would be for a data set without errors", "Mend the errors first.")
    if path.exists():
        raise UserError(path, "it is there already", "Name another file, or remove it.")
    parse_config(contents["configuration"], path)
    with replacing(path) as temporary:
        temporary.write_text(yaml.safe_dump(contents["configuration"], sort_keys=False, default_flow_style=None))


def _check_dataset(path: Path) -> tuple[list[Problem], dict[str, Any] | None]:
    try:
        dataset, errors = survey(path)
    except UserError as error:
        return [_problem(error)], None
    problems = [_problem(error) for error in errors]
    held: dict[Case, Contents] = {}
    present: set[int] = set()
    with progress("checking", len(dataset.cases)) as advance:
        for case in dataset.cases:
            scan, label_maps, found = _check_case(case, dataset)
            problems += found
            if scan:
                held[case] = contents_of(scan, label_maps, dataset.labels)
                present.update(*held[case].volumes_ml)
            advance()
    problems += map(_problem, twins(dataset.root, {case.name: contents.digest for case, contents in held.items()}))
    for value in dataset.labels.keys() - present - {0}:
        what = f"label {value} ({dataset.labels[value]}) is declared and in no label file"
        advice = "Remove it from dataset.json, or add cases that show it."
        problems.append(Problem(str(dataset.root), what, advice, "warning"))
    problems += _unusual_spacings(held)
    if any(problem.level == "error" for problem in problems):
        return _gathered(problems), None
    contents = list(held.values())
    return _gathered(problems), {
        **fingerprint(dataset, contents),
        "configuration": proposal(path, dataset, contents),
    }


def _check_case(case: Case, dataset: Dataset) -> tuple[Scan | None, list[Int[np.ndarray, "x y z"]], list[Problem]]:
    """The scan, the label maps on its grid, and the problems of all of its files."""
    scan, problems = None, []
    if all(path.is_file() for path in case.images):
        try:
            scan = read_case(case, len(dataset.channels))
            problems += _warnings(scan)
        except UserError as error:
            problems.append(_problem(error))
    if not case.labels:
        advice = "Name its label in the data set's description, or leave the case out of it."
        problems.append(Problem(str(case.image), "it has no label", advice))
    fitting = []
    for path in filter(Path.is_file, case.labels):
        try:
            label_map, affine = read_label_map(path)
        except UserError as error:
            problems.append(_problem(error))
            continue
        try:
            if scan:
                check_same_grid(path, label_map.shape, affine, scan.path, scan.shape, scan.affine)
            fitting.append(label_map)
        except UserError as error:
            problems.append(_problem(error))
        problems += _check_label(path, label_map, dataset, case.ignore)
    return scan, fitting, problems


def _check_label(
    path: Path, label_map: Int[np.ndarray, "x y z"], dataset: Dataset, ignore: int | None
) -> list[Problem]:
    values, problems = set(np.unique(label_map).tolist()), []
    try:
        check_values(values, {*dataset.labels, ignore}, path)
    except UserError as error:
        problems.append(_problem(error))
    if values == {0}:
        problems.append(Problem(str(path), "it is empty", "Fine if the scan shows no structure.", "warning"))
    if 0 not in values:
        problems.append(Problem(str(path), "every voxel is labelled", "Is its background really 0?", "warning"))
    return problems


def _unusual_spacings(held: dict[Case, Contents]) -> list[Problem]:
    """Spacings, sorted within a case as axis orders differ, that are far from the median of the set."""
    if not held:
        return []
    spacings = {case: sorted(contents.spacing_mm) for case, contents in held.items()}
    median = np.median(list(spacings.values()), axis=0)
    problems = []
    for case, spacing in spacings.items():
        if (np.abs(np.log(spacing / median)) > np.log(UNUSUAL_SPACING)).any():
            what = f"its voxels measure {_times(spacing)} mm, those of the set {_times(median)} mm in the median"
            problems.append(Problem(str(case.image), what, "Check the unit and the spacing in its header.", "warning"))
    return problems


def _warnings(scan: Scan) -> list[Problem]:
    advice = "See that this is right before you trust it."
    return [Problem(str(scan.path), warning, advice, "warning") for warning in scan.warnings]


def _gathered(problems: Sequence[Problem]) -> list[Problem]:
    """Errors first; a warning that many files give stands once, with their number."""
    same: dict[tuple[str, str, str], list[Problem]] = defaultdict(list)
    for problem in problems:
        key = problem.where if problem.level == "error" else ""
        same[problem.level, problem.what, key].append(problem)
    found = []
    for first, *others in same.values():
        counted = f"{first.what} (and {len(others)} more files)" if others else first.what
        found.append(replace(first, what=counted))
    return sorted(found, key=lambda problem: problem.level)


def _problem(error: UserError) -> Problem:
    return Problem(error.where, error.what, error.advice)


def _times(numbers: Sequence[float] | np.ndarray) -> str:
    return " x ".join(f"{number:g}" for number in numbers)
