"""The scans that a path stands for: a file, a DICOM series, a folder of these at any depth, an archive."""

import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from medseg_diff.errors import UserError
from medseg_diff.scans.archive import unpacked
from medseg_diff.scans.frames import is_dicom
from medseg_diff.scans.read import KINDS, scan_name, suffix_of

RESULT = re.compile(r"(.+?)(_seg|\.seg|_label_\d+_\w*|_prob|_uncertainty|_samples|_preview)")
"""How our own files end, which may lie beside their scan."""


@dataclass(frozen=True)
class Source:
    """A scan to be read, or an archive of scans.

    Attributes:
        path: where to read it; in a temporary folder where it came out of an archive.
        shown: what messages and reports call it.
        under: where it lies in the folder that was given, and its results in that of the results.

    """

    path: Path
    shown: Path
    under: Path = Path()

    @property
    def name(self) -> str:
        """The stem of everything written about it."""
        return scan_name(self.path)


def find_scans(paths: list[Path], apart: Path | None = None) -> list[Source]:
    """The scans below `paths`, sorted, without what lies in the folder `apart`; what is no folder stands for itself.

    Labels are left alone (`labels*` beside `images*`), and so are our own results beside their scan. Two scans whose
    results would have the same name are a UserError; `read_scan` refuses what cannot be read.
    """
    found = []
    for given in (Source(Path(path), Path(path)) for path in paths):
        found += list(_below(given, Path(), apart)) or [given]
    names: dict[Path, Source] = {}
    for source in found:
        other = names.setdefault(source.under / source.name, source)
        if other is not source:
            what = f"its outputs would overwrite those of {other.shown}"
            raise UserError(source.shown, what, "Rename one, or run them into two folders.")
    return found


@contextmanager
def opened(source: Source) -> Iterator[list[Source]]:
    """The scans of an archive, as long as the context lasts; any other scan, a zipped DICOM series too, is itself."""
    if not _holds_volumes(source.path):
        yield [source]
        return
    with unpacked(source.path) as folder:
        yield list(_below(Source(folder, source.shown), source.under / source.name))


def _below(source: Source, inside: Path, apart: Path | None = None) -> Iterator[Source]:
    """What lies in a folder, depth first, with results in `inside`; a file or a series is itself.

    Links to folders are not followed: one may lead round in a circle.
    """
    if apart is not None and inside != Path() and source.path.resolve() == apart.resolve():
        return
    try:
        entries = _entries(source.path) if source.path.is_dir() else []
        is_scan = not source.path.is_dir() or _is_series(entries)
    except OSError:
        is_scan = True  # `read_scan` says why not
    if is_scan:
        yield source
        return
    images = any(entry.name.startswith("images") for entry in entries)
    names = {scan_name(entry) for entry in entries}
    for entry in entries:
        found = Source(entry, source.shown / entry.name, inside)
        if suffix_of(entry):
            result = RESULT.fullmatch(scan_name(entry))
            if result is None or result[1] not in names:
                yield found
        elif entry.is_dir() and not entry.is_symlink() and not (images and entry.name.startswith("labels")):
            yield from _below(found, inside / entry.name, apart)


def _entries(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.name[0] != ".")


def _is_series(entries: list[Path]) -> bool:
    """Whether a folder is one scan; beside other volumes a DICOM file is a stray, as our knee_seg.dcm may be."""
    return any(map(is_dicom, entries)) and not any(map(_is_volume, entries))


def _is_volume(path: Path) -> bool:
    return KINDS.get(suffix_of(path).lower()) in ("nifti", "nrrd", "mha")


def _holds_volumes(path: Path) -> bool:
    """Whether it is a zip with volumes in it; one that cannot be listed is for `read_scan` to refuse."""
    if KINDS.get(suffix_of(path).lower()) != "dicom" or not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(_is_volume(Path(name)) for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False
