"""Files that are written whole or not at all, and folders that one process owns."""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medseg_diff.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside `path`, with its suffixes, to write to; then it takes the place of `path`.

    The old file stays whole until the new one is on the disk; after an error the new one is removed.
    UserError where the disk refuses.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}{''.join(path.suffixes[-2:])}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        what = f"it cannot be written ({error.strerror or error})"
        raise UserError(path, what, "Free some space, or choose a folder that can be written to.") from error


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Keeps a second process out of a folder. The system drops the lock of a process that dies. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        what = f"it cannot be written to ({error.strerror})"
        raise UserError(folder, what, "Choose a folder that can be written to.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            what = "another process is working there"
            raise UserError(folder, what, "Wait for it, or choose another name.") from error
        except OSError as error:
            what = f"it cannot be locked ({error.strerror})"
            raise UserError(folder, what, "Choose a folder on a disk that knows locks.") from error
        yield


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
