"""DICOM series: every slice's header is checked, because a series with a missing slice reads silently, stretched."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pydicom.pixels import iter_pixels

from medseg_diff.errors import UserError
from medseg_diff.scans.archive import unpacked
from medseg_diff.scans.frames import EXPORT, Frame, frames_of, is_dicom, muted, series_of
from medseg_diff.scans.geometry import check_geometry
from medseg_diff.scans.itk import LPS_TO_RAS


def read_dicom(path: Path, channels: int, series: str | None = None) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Values "1 x y z" as rescaled float32, RAS affine in mm, warnings; from a file, a folder or a zip.

    `series` is the number or the UID of the one to read where there are several.
    """
    if channels != 1:
        raise UserError(
            path, f"a DICOM series holds one channel, the model needs {channels}", "Give a NIfTI of them all."
        )
    with unpacked(path) as folder:
        frames, notes = read_frames(path, folder, series)
        affine = _affine(path, frames)
        shape = frames[0].columns, frames[0].rows, len(frames)
        notes += check_geometry(path, affine, shape)
        return _decoded(path, frames)[None].transpose(0, 3, 2, 1), affine, notes


def read_frames(path: Path, folder: Path, series: str | None = None) -> tuple[list[Frame], list[str]]:
    """The frames of one series in `folder`, along its normal, and warnings; messages call the folder `path`."""
    found: list[Frame] = []
    refused: dict[str | None, UserError] = {}
    ignored = 0
    for file in [folder] if folder.is_file() else _files(path, folder):
        where = path / file.relative_to(folder)
        try:
            frames = frames_of(where, file) if is_dicom(file) or file.suffix.lower() == ".dcm" else []
        except UserError as error:
            frames = []
            refused.setdefault(series_of(file), error)
        ignored += not frames
        found += frames
    if not found:
        nothing = UserError(path, "it holds no DICOM image", "Give the folder of a DICOM series, or a scan file.")
        raise next(iter(refused.values()), nothing)
    chosen = _choose(path, found, series)
    first = chosen[0]
    if problem := refused.get(first.series, refused.get(None)):
        raise problem
    for other in chosen:
        same = (other.rows, other.columns) == (first.rows, first.columns)
        same = same and np.allclose(other.spacing_mm, first.spacing_mm, rtol=1e-3)
        if not same or not np.allclose(other.orientation, first.orientation, atol=1e-3):
            what = f"its size, spacing or orientation differs from that of {first.name}"
            raise UserError(path / other.path.relative_to(folder), what, "Give only slices of one volume.")
    chosen.sort(key=lambda frame: frame.position_mm @ np.cross(*first.orientation))
    return chosen, [f"{ignored} files that are no DICOM slices were ignored"] if ignored else []


def _files(path: Path, folder: Path) -> Iterator[Path]:
    """All below a folder but hidden ones; a UserError for links that leave it and what is no regular file."""
    for file in sorted(folder.rglob("*")):
        if file.is_dir() or file.name.startswith("."):
            continue
        if not file.is_file() or (file.is_symlink() and folder.resolve() not in file.resolve().parents):
            where, advice = path / file.relative_to(folder), "Remove it, or copy the series without links."
            raise UserError(where, "it is no regular file of this folder", advice)
        yield file


def _choose(path: Path, frames: list[Frame], wanted: str | None) -> list[Frame]:
    """The frames of the series that is wanted, or of the only one; else a UserError that lists them."""
    series = defaultdict(list)
    for frame in frames:
        series[frame.series].append(frame)
    known = Counter(members[0].number for members in series.values())
    names = {uid: members[0].number if known[members[0].number] == 1 else uid for uid, members in series.items()}
    chosen = [uid for uid in series if wanted is None or wanted in (uid, names[uid])]
    if len(chosen) == 1:
        return series[chosen[0]]
    listed = "; ".join(
        f"{names[uid] or uid}: {members[0].description or 'no description'}, {len(members)} slices"
        for uid, members in sorted(series.items(), key=lambda item: (len(names[item[0]]), names[item[0]]))
    )
    what = f"it holds {len(series)} series" if wanted is None else f"it holds no series {wanted}"
    raise UserError(path, f"{what} ({listed})", f"Choose one: --series {min(names.values(), key=len) or chosen[0]}.")


@muted()
def _decoded(path: Path, frames: list[Frame]) -> np.ndarray:
    """The rescaled values "z y x" of frames that agree in size."""
    values = np.empty((len(frames), frames[0].rows, frames[0].columns), np.float32)
    files = defaultdict(list)
    for z, frame in enumerate(frames):
        files[frame.path].append((frame.index, z))
    for file, members in files.items():
        indices, places = zip(*sorted(members), strict=True)
        try:
            for z, pixels in zip(places, iter_pixels(file, indices=indices), strict=True):
                values[z] = pixels * frames[z].slope + frames[z].intercept
        except (OSError, MemoryError):
            raise
        except Exception as error:  # of many kinds: each decoder has its own
            raise UserError(path, f"the pixels of {frames[places[0]].path.name} cannot be decoded", EXPORT) from error
    return values


def _affine(path: Path, frames: list[Frame]) -> np.ndarray:
    """RAS affine of the stack; UserError unless its slices lie evenly along a line. DICOM PS3.3 C.7.6.2.1.1."""
    first, n = frames[0], len(frames)
    rows, columns = first.orientation
    normal = np.cross(rows, columns)
    positions = np.array([frame.position_mm for frame in frames])
    step = (positions[-1] - positions[0]) / (n - 1) if n > 1 else normal * first.thickness_mm
    gaps = np.diff(positions @ normal)
    if n > 1 and gaps.min() < 1e-3:
        i = int(gaps.argmin())
        what = f"the slices {frames[i].name} and {frames[i + 1].name} lie at the same place"
        raise UserError(path, what, "Remove the duplicated slice, or split a series of several volumes.")
    if abs(positions - positions[0] - np.outer(np.arange(n), step)).max() > 0.1 * np.linalg.norm(step):
        i, usual = int(gaps.argmax()), statistics.median_low(gaps.tolist())
        what = f"a slice is missing or out of line: {frames[i].name} and {frames[i + 1].name} lie "
        raise UserError(path, what + f"{gaps[i]:.3g} mm apart, most slices {usual:.3g} mm", EXPORT)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = rows * first.spacing_mm[1], columns * first.spacing_mm[0]
    affine[:3, 2], affine[:3, 3] = step, first.position_mm
    return LPS_TO_RAS @ affine
