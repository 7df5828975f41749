"""Files of a case -> its scan and its label maps, on one grid."""

from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Int

from medseg_diff.datasets.description import first
from medseg_diff.datasets.layouts import Case
from medseg_diff.errors import UserError
from medseg_diff.scans.geometry import check_same_grid
from medseg_diff.scans.read import Scan, read_label_map, read_scan


def read_case(case: Case, channels: int) -> Scan:
    """The scan of a case, whose channels are in one file or in a file each. Raises UserError."""
    if not case.further:
        return read_scan(case.image, channels)
    if len(case.images) != channels:
        what = f"{case.name} has {len(case.images)} files, one a channel, and {channels} channels are declared"
        raise UserError(case.image, what, "Give a file for every channel.")
    start, *others = parts = [read_scan(path) for path in case.images]
    for part in others:
        check_same_grid(part.path, part.shape, part.affine, start.path, start.shape, start.affine)
    warnings = dict.fromkeys(warning for part in parts for warning in part.warnings)
    array = np.concatenate([part.array for part in parts])
    return replace(start, name=case.name, array=array, warnings=tuple(warnings))


def read_reference(path: Path, scan: Scan) -> Int[np.ndarray, "x y z"]:
    """A label map that lies on the grid of a scan. Raises UserError."""
    label_map, affine = read_label_map(path)
    check_same_grid(path, label_map.shape, affine, scan.path, scan.shape, scan.affine)
    return label_map


def check_values(found: Iterable[int], allowed: Collection[int | None], path: Path) -> None:
    """UserError where a label file holds values that are not declared."""
    unknown = sorted(set(found) - set(allowed))
    if unknown:
        what = f"it holds label value(s) that are not declared: {first(list(map(str, unknown)))}"
        raise UserError(path, what, "Declare them under 'labels' of dataset.json, or correct the file.")
