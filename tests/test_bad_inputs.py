"""Every bad input of the list: made, given to the program, and what must happen does."""

from pathlib import Path

import pytest
from bad_inputs import CASES
from bad_inputs.case import call, segment
from bad_inputs.nifti import file, nifti

PARAMETERS = [
    pytest.param(case, id=f"{case.number}: {case.what}", marks=[pytest.mark.slow] * case.slow) for case in CASES
]


@pytest.mark.parametrize("case", PARAMETERS)
def test_what_must_happen_does(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEDSEG_DIFF_MODEL", raising=False)
    case.check(tmp_path)


def test_every_number_of_the_list_is_there():
    assert {case.number for case in CASES} == set(range(1, 79))


def test_a_batch_goes_on_and_lists_what_was_refused(tmp_path, monkeypatch):
    """All files that must be refused, and a good one between them, in one call."""
    monkeypatch.chdir(tmp_path)
    paths = []
    for index, case in enumerate(case for case in CASES if case.make and case.seen is None and not case.slow):
        (tmp_path / f"{index}").mkdir()
        made = case.make(tmp_path / f"{index}")
        paths.append(made.rename(made.with_name(f"{index}_{made.name}")))
    good, half = file("good.nii", nifti())(tmp_path), len(paths) // 2
    code, out, _ = call("segment", *paths[:half], *segment(good)[1:], *paths[half:])
    assert code == 1
    assert f"1 of {len(paths) + 1} scans segmented" in out
    assert all(f"refused: {path}" in out for path in paths)
    assert {path.name for path in Path("out").iterdir()} >= {"good_seg.nii.gz", "good_report.json"}
    assert not [path for path in Path("out").rglob("*_seg*") if path.name != "good_seg.nii.gz"]
