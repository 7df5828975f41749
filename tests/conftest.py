"""Fixtures shared by the tests: real data where it is there, a skip with the reason where it is not."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("MEDSEG_DIFF_DATA", Path(__file__).resolve().parents[2] / "shared/data"))


def _real(name: str) -> Path:
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"real data is absent: no {folder}; set MEDSEG_DIFF_DATA to the folder that holds it")
    return folder


@pytest.fixture(scope="session")
def hippocampus() -> Path:
    """Task04 of the Medical Segmentation Decathlon."""
    return _real("Task04_Hippocampus")


@pytest.fixture(scope="session")
def dicom() -> Path:
    """A folder of DICOM series, one folder each."""
    return _real("dicom")
