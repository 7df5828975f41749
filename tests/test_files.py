import errno
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from medseg_diff.errors import UserError
from medseg_diff.files import owned, replacing


@contextmanager
def file_size_limit(count: int):
    """Writing beyond it fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_new_file_takes_the_place_of_the_old_one(tmp_path: Path):
    path = tmp_path / "new" / "folder" / "a.txt"
    for text in ("first", "second"):
        with replacing(path) as temporary:
            temporary.write_text(text)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_the_old_file_stays_whole_after_an_error(tmp_path: Path, error: type[BaseException]):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write_half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_said_and_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    refused = pytest.raises(UserError, match=r"a\.bin.*cannot be written.*Free some space")
    with refused, replacing(path) as temporary, file_size_limit(1000):
        temporary.write_bytes(bytes(5000))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_sync_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match="No space left"), replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_is_said(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), replacing(tmp_path / "file" / "a.txt"):
        raise AssertionError("there is nowhere to write")
    with pytest.raises(UserError, match="cannot be written to"), owned(tmp_path / "file"):
        raise AssertionError("nothing to own")


def test_the_path_aside_keeps_the_suffixes_and_cannot_be_guessed(tmp_path: Path):
    seen = set()
    for _ in range(2):
        for name in ("a.nii.gz", "b.image.npy", "c.seg.nrrd", "d.png", "e"):
            with replacing(tmp_path / name) as temporary:
                assert temporary.parent == tmp_path
                assert temporary.name.endswith("".join(Path(name).suffixes))
                assert temporary.name.startswith(".")
                temporary.touch()
                seen.add(temporary)
    assert len(seen) == 10


def test_a_long_name_can_be_written(tmp_path: Path):
    with replacing(tmp_path / f"{'x' * 248}.nii.gz") as temporary:
        temporary.touch()
    assert (tmp_path / f"{'x' * 248}.nii.gz").exists()


HOLD = """
import sys
from pathlib import Path
from medseg_diff.files import owned
with owned(Path(sys.argv[1])):
    print(flush=True)
    input()
"""


def test_a_folder_has_one_owner_and_a_dead_one_leaves_it(tmp_path: Path):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(UserError, match=r"run: another process is working there"), owned(folder):
            raise AssertionError("two owners")
        other.kill()
        other.wait()
    for _ in range(2):
        with owned(folder):
            (folder / "mine").touch()
    with pytest.raises(OSError, match="body"), owned(folder):
        raise OSError("body")
