"""Zip archives of DICOM series, unpacked only where that can do no harm."""

import errno
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from medseg_diff.errors import UserError
from medseg_diff.scans.geometry import VOXEL_LIMIT

UNZIPPED_LIMIT = 4 * VOXEL_LIMIT
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, struct.error)
HARMLESS, LARGEST_RATIO = 1 << 28, 100  # bytes; beyond them a scan is not compressed so much, and a bomb is


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """A temporary folder with what a zip holds; what is no zip as it is. UserError where it reaches out or explodes."""
    if path.suffix.lower() != ".zip":
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                _check_members(path, archive.infolist())
                archive.extractall(folder)
        except (*DAMAGED, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that comes of offsets before the start
                raise
            raise UserError(path, "the zip is damaged or of an unusual kind", "Zip the series again.") from error
        yield Path(folder)


def _check_members(path: Path, members: list[zipfile.ZipInfo]) -> None:
    for member in members:
        name = PurePosixPath(member.filename.replace("\\", "/"))
        link = (member.external_attr >> 16) & 0o170000 == 0o120000
        outside = not name.parts or name.is_absolute() or ".." in name.parts or ":" in name.parts[0]
        if outside or link or member.flag_bits & 1:
            what = f"its member {member.filename!r} is encrypted, a link, nameless, or would be written outside"
            raise UserError(path, what, "Zip the plain folder of the series again.")
    size, packed = sum(member.file_size for member in members), path.stat().st_size
    limit = min(UNZIPPED_LIMIT, max(HARMLESS, LARGEST_RATIO * packed))
    if size > limit:
        raise UserError(path, f"it would unzip to {size} bytes; {limit} are read", "Give the folder instead.")
