"""A bad input: how it is made, what must happen, and the check that it does."""

import contextlib
import io
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import nibabel as nib
import numpy as np
from conftest import untrained

from medseg_diff import cli
from medseg_diff.scans.read import read_scan

Maker = Callable[[Path], Path]
"""Writes the input into an empty folder; gives the path that the program, and its peers, are called with."""

Command = Callable[[Path], list[object]]
"""What the program is called with for such a path; it may write what it needs into the working folder."""

MOST_S, MOST_KB = 5.0, 1_000_000
"""What a refusal may take: seconds of the processor, as other work on the machine is not ours, and memory."""


@dataclass(frozen=True)
class Volume:
    """What a reader must see in a file: values x y z, and the affine to RAS in mm."""

    values: np.ndarray
    affine: np.ndarray


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        number: of the list; several inputs may share one.
        what: the input, in words.
        must: what must happen, in words.
        check: asserts that it does, in an empty working folder.
        make: the scan, for peers to read; None where no scan is bad.
        seen: what is in it; None where it must be refused.
        slow: the check takes more than ten seconds.

    """

    number: int
    what: str
    must: str
    check: Callable[[Path], None]
    make: Maker | None = None
    seen: Volume | None = None
    slow: bool = False


def call(*arguments: object) -> tuple[int, str, str]:
    """Runs the program in this process: exit code, stdout, stderr."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with patch.object(sys, "argv", ["medseg-diff", *map(str, arguments)]):
                cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return code, out.getvalue(), err.getvalue()


def segment(path: Path) -> list[object]:
    """The scan, segmented into `out` by a tiny model."""
    model = untrained(Path("tiny.safetensors"))
    return ["segment", path, "--model", model, "--out", "out", "--save", "seg,report", "--samples", 2]


def refused(
    number: int, what: str, make: Maker, says: str, command: Command = segment, must: str = "refuse", scan: bool = True
) -> Case:
    """Exit code 2; one line that says where, why and what to do; nothing written; little time and memory."""

    def check(folder: Path) -> None:
        path = make(_new(folder / "given"))
        arguments = command(path)
        before = files(folder)
        peak, begin = _peak_kb(), time.process_time()
        code, out, err = call(*arguments)
        assert time.process_time() - begin < MOST_S
        assert peak() < MOST_KB
        line = err.splitlines()[-1]
        assert code == 2, (code, out, err)
        assert re.match(rf"(refused|error): {re.escape(str(path))}", line), err
        assert re.search(says, line), err
        assert re.search(r"[.:?)'] [A-Z].{10,}\.$", line), err
        assert "Traceback" not in out + err
        assert files(folder) == before

    return Case(number, what, must, check, make if scan else None)


def warned(number: int, what: str, make: Maker, says: str, seen: Volume, must: str = "warn") -> Case:
    """The mask of the same volume in a plain file; the warning on stderr and in the report."""

    def check(folder: Path) -> None:
        path = make(_new(folder / "given"))
        warnings = segmented(path, seen)
        assert len(warnings) == 1, warnings
        assert re.search(says, warnings[0]), warnings

    return Case(number, what, must, check, make, seen)


def same(number: int, what: str, make: Maker, seen: Volume, must: str = "same mask") -> Case:
    """The mask of the same volume in a plain file, and no warning."""

    def check(folder: Path) -> None:
        assert segmented(make(_new(folder / "given")), seen) == []

    return Case(number, what, must, check, make, seen)


def segmented(path: Path, seen: Volume) -> list[str]:
    """The warnings about a scan that holds `seen`, and gets the mask of the same volume in a plain file."""
    scan = read_scan(path)
    finite = np.isfinite(seen.values)
    np.testing.assert_allclose(scan.array[0][finite], seen.values[finite], rtol=1e-6)
    np.testing.assert_allclose(scan.affine, seen.affine, rtol=1e-4, atol=1e-4)
    values = np.where(finite, seen.values, scan.array[0])
    mask, warnings = mask_of(path)
    plain = Path("plain.nii.gz")
    nib.save(nib.Nifti1Image(values.astype(np.float32), seen.affine), plain)
    np.testing.assert_array_equal(mask, mask_of(plain)[0])
    return warnings


def mask_of(path: Path, *options: object) -> tuple[np.ndarray, list[str]]:
    """The mask, which lies on the scan's own grid, and the warnings, each of them on stderr too."""
    code, out, err = call(*segment(path), *options)
    assert code == 0, (out, err)
    assert "Traceback" not in err
    scan = read_scan(path)
    written = nib.load(f"out/{scan.name}_seg.nii.gz")
    assert written.shape == scan.header.get_data_shape()[: len(written.shape)]
    np.testing.assert_array_equal(written.affine, scan.header.get_best_affine())
    warnings = json.loads(Path(f"out/{scan.name}_report.json").read_text())["warnings"]
    assert all(f"{warning}\n" in err for warning in warnings)
    return np.asarray(written.dataobj).reshape(scan.shape), warnings


def files(folder: Path) -> set[Path]:
    """Every file below a folder, but what training prepares for another time."""
    return {path for path in folder.rglob("*") if not path.is_dir() and "cache" not in path.parts}


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _peak_kb() -> Callable[[], int]:
    """Starts to watch the memory; what is given tells how much more than now it has been at most."""
    if sys.platform != "linux":
        return lambda: 0
    Path("/proc/self/clear_refs").write_text("5")
    now = _status_kb("VmRSS")
    return lambda: _status_kb("VmHWM") - now


def _status_kb(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])
