"""Every problem of a data set or a scan at once, and what a data set holds."""

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medseg_diff.console import progress
from medseg_diff.datasets.layouts import Case, Dataset, survey, visible
from medseg_diff.errors import UserError
from medseg_diff.scans.read import KINDS, Scan, find_scans, read_label_map, read_scan

AFFINE_TOLERANCE = 1e-3
UNUSUAL_SPACING = 3.0  # times the median, or a part of it


@dataclass(frozen=True)
class Problem:
    """Where, what, and what to do; an error keeps the program from trusting the file, a warning does not."""

    where: str
    what: str
    advice: str
    level: Literal["error", "warning"] = "error"


@dataclass(frozen=True)
class Contents:
    """What is remembered of a case once its voxels are gone; volumes are by label value, one mapping a label file."""

    digest: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    percentiles: np.ndarray
    volumes_ml: list[dict[int, float]]


def check(path: Path) -> tuple[list[Problem], dict[str, Any] | None]:
    """Every problem of a data set (a folder with dataset.json, or imagesTr) or of scans; none where all is well.

    With them, what a data set without errors holds: cases, and over them shapes, spacings, intensities and volumes of
    the labels. Values are {"median", "min", "max"} over the cases, a list for the three axes of the files; the volume
    of a label is over the label files that hold it, and `files` counts these.
    """
    if (path / "dataset.json").exists() or (path / "imagesTr").is_dir():
        return _check_dataset(path)
    try:
        scans = find_scans([path])
    except UserError as error:
        return [_problem(error)], None
    problems = []
    with progress("checking", len(scans)) as advance:
        for scan in scans:
            problems += _check_scan(scan, channels=1)[1]
            advance()
    return problems, None


def _check_dataset(root: Path) -> tuple[list[Problem], dict[str, Any] | None]:
    try:
        dataset, errors = survey(root)
    except UserError as error:
        return [_problem(error)], None
    problems = [_problem(error) for error in errors]
    contents = {}
    present: set[int] = set()
    with progress("checking", len(dataset.cases)) as advance:
        for case in dataset.cases:
            scan, counts, found = _check_case(case, dataset)
            problems += found
            present.update(*counts)
            if scan:
                contents[case] = _contents(scan, counts)
            advance()
    problems += _unlisted(dataset) + _twins(root, contents)
    for value in dataset.labels.keys() - present - {0}:
        what = f"label {value} ({dataset.labels[value]}) is declared and in no label file"
        problems.append(Problem(str(root), what, "Remove it from dataset.json, or add cases that show it.", "warning"))
    problems += _unusual_spacings({case: sorted(held.spacing_mm) for case, held in contents.items()})
    sound = all(problem.level == "warning" for problem in problems)
    return problems, _fingerprint(dataset, list(contents.values())) if sound else None


def _check_case(case: Case, dataset: Dataset) -> tuple[Scan | None, list[dict[int, int]], list[Problem]]:
    """The scan, the voxels of each value in each of its label files, and the problems of all of them."""
    scan, problems = _check_scan(case.image, len(dataset.channels)) if case.image.is_file() else (None, [])
    if not case.labels:
        advice = "Name its label in dataset.json, or move the case out of 'training'."
        problems.append(Problem(str(case.image), "it has no label", advice))
    counts = []
    for path in filter(Path.is_file, case.labels):
        count, found = _check_label(path, scan, dataset.labels)
        counts.append(count)
        problems += found
    return scan, counts, problems


def _contents(scan: Scan, counts: list[dict[int, int]]) -> Contents:
    digest = hashlib.sha256(scan.array.data).hexdigest()
    volumes_ml = [{value: count * scan.voxel_ml for value, count in found.items()} for found in counts]
    return Contents(digest, scan.shape, scan.spacing_mm, np.percentile(scan.array, [0.5, 50, 99.5]), volumes_ml)


def _fingerprint(dataset: Dataset, contents: list[Contents]) -> dict[str, Any]:
    volumes_ml = defaultdict(list)
    for found in (found for held in contents for found in held.volumes_ml):
        for value, volume in found.items():
            volumes_ml[value].append(volume)
    percentiles = np.transpose([held.percentiles for held in contents])
    return {
        "cases": len(dataset.cases),
        "raters": sorted({len(case.labels) for case in dataset.cases}),
        "shape": _spread([held.shape for held in contents]),
        "spacing_mm": _spread([held.spacing_mm for held in contents]),
        "intensity_percentile": dict(zip(("0.5", "50", "99.5"), map(_spread, percentiles), strict=True)),
        "volume_ml": {
            name: {"files": len(volumes_ml[value]), **(_spread(volumes_ml[value]) if volumes_ml[value] else {})}
            for value, name in dataset.labels.items()
            if value
        },
    }


def _twins(root: Path, contents: dict[Case, Contents]) -> list[Problem]:
    names: dict[str, list[str]] = defaultdict(list)
    for case, held in contents.items():
        names[held.digest].append(case.name)
    advice = "Keep one: a copy in training and validation would make the scores too good."
    return [
        Problem(str(root), f"the same scan under several names: {', '.join(same)}", advice)
        for same in names.values()
        if len(same) > 1
    ]


def _check_scan(path: Path, channels: int) -> tuple[Scan | None, list[Problem]]:
    try:
        scan = read_scan(path, channels)
    except UserError as error:
        return None, [_problem(error)]
    advice = "See that this is right before you trust it."
    return scan, [Problem(str(path), warning, advice, "warning") for warning in scan.warnings]


def _check_label(path: Path, scan: Scan | None, labels: dict[int, str]) -> tuple[dict[int, int], list[Problem]]:
    """The voxels of each value in a label file, and its problems; without a scan, its grid is compared with nothing."""
    try:
        label_map, affine = read_label_map(path)
    except UserError as error:
        return {}, [_problem(error)]
    where, problems = str(path), []
    if scan and label_map.shape != scan.shape:
        what = f"its shape is {_times(label_map.shape)}, that of its image {scan.path} is {_times(scan.shape)}"
        problems.append(Problem(where, what, "Draw it on the grid of the image, or resample it to that (nearest)."))
    elif scan and (gap := float(np.abs(affine - scan.affine).max())) > AFFINE_TOLERANCE:
        what = f"its affine differs from that of its image {scan.path} by up to {gap:.3g}"
        advice = "If the voxels fit, copy the header of the image into the label; if not, resample it (nearest)."
        problems.append(Problem(where, what, advice))
    found, counts = np.unique(label_map, return_counts=True)
    values = dict(zip(found.tolist(), counts.tolist(), strict=True))
    if undeclared := sorted(values.keys() - labels.keys()):
        what = f"dataset.json does not declare the label value(s) {', '.join(map(str, undeclared))}"
        problems.append(Problem(where, what, "Declare them under 'labels', or correct the file."))
    if values.keys() == {0}:
        problems.append(Problem(where, "it is empty", "Fine if the scan shows no structure.", "warning"))
    if 0 not in values:
        problems.append(Problem(where, "every voxel is labelled", "Is its background really 0?", "warning"))
    return values, problems


def _unlisted(dataset: Dataset) -> list[Problem]:
    """Images without a label and labels without an image: files beside the listed ones that no case lists."""
    images = {case.image for case in dataset.cases}
    labels = {path for case in dataset.cases for path in case.labels}
    problems = []
    for listed, noun, other in ((images, "an image", "label"), (labels, "a label", "image")):
        folders = {path.parent for path in listed}
        beside = {path for folder in folders if folder.is_dir() for path in visible(folder.iterdir())}
        for path in sorted(beside - images - labels):
            if path.name.lower().endswith(tuple(KINDS)):
                advice = f"List it in dataset.json with its {other}, or move it away."
                problems.append(Problem(str(path), f"it is {noun} that no case lists", advice))
    return problems


def _unusual_spacings(spacings: dict[Case, list[float]]) -> list[Problem]:
    """Spacings, sorted within a case as axis orders differ, that are far from the median of the set."""
    if not spacings:
        return []
    median = np.median(list(spacings.values()), axis=0)
    problems = []
    for case, spacing in spacings.items():
        if (np.abs(np.log(spacing / median)) > np.log(UNUSUAL_SPACING)).any():
            what = f"its voxels measure {_times(spacing)} mm, those of the set {_times(median)} mm in the median"
            problems.append(Problem(str(case.image), what, "Check the unit and the spacing in its header.", "warning"))
    return problems


def _spread(values: Any) -> dict[str, Any]:
    return {
        name: function(np.asarray(values), axis=0).tolist()
        for name, function in (("median", np.median), ("min", np.min), ("max", np.max))
    }


def _problem(error: UserError) -> Problem:
    return Problem(error.where, error.what, error.advice)


def _times(numbers: Any) -> str:
    return " x ".join(f"{number:g}" for number in numbers)
