"""59-65: sets to train on whose labels do not fit their images, or are the same case twice. No weight is trained."""

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel as nib
import numpy as np

from bad_inputs.case import Case, call, files, refused
from medseg_diff.datasets.phantom import make_phantom

CONFIG = Path(__file__).resolve().parents[2] / "configs/quickstart.yaml"


@cache
def _kept() -> TemporaryDirectory[str]:
    return TemporaryDirectory()


def phantom() -> Path:
    """A sound set, made once."""
    root = Path(_kept().name) / "set"
    if not root.exists():
        make_phantom(root, 4, "ct", 1, 0)
    return root


def train(root: Path) -> list[object]:
    """All that training does before its first step, and one step."""
    settings = (f"data.root={root}", "data.cache=cache", "data.folds=2", "network.widths=[8,8,8,8]")
    return ["train", "--config", CONFIG, "--dry-run", *(part for setting in settings for part in ("--set", setting))]


def _set(change: Callable[[Path], object]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        root = folder / "set"
        shutil.copytree(phantom(), root)
        change(root)
        return root

    return make


def _label(change: Callable[[np.ndarray], np.ndarray], shift_mm: float = 0.0) -> Callable[[Path], Path]:
    """The label of the second case, changed."""

    def changed(root: Path) -> None:
        path = root / "labelsTr/phantom_001.nii.gz"
        old = nib.load(path)
        array, affine = change(np.asarray(old.dataobj).copy()), old.affine.copy()
        affine[0, 3] += shift_mm
        nib.save(nib.Nifti1Image(array, affine), path)

    return _set(changed)


def _description(change: Callable[[list[dict[str, str]]], object]) -> Callable[[Path], Path]:
    return _set(lambda root: _edit(root, change))


def _edit(root: Path, change: Callable[[list[dict[str, str]]], object]) -> None:
    """Changes the list of cases."""
    description = json.loads((root / "dataset.json").read_text())
    change(description["training"])
    (root / "dataset.json").write_text(json.dumps(description))


def _unlabelled(root: Path) -> None:
    (root / "labelsTr/phantom_001.nii.gz").unlink()
    _edit(root, lambda training: training[1].pop("label"))


def _imageless(root: Path) -> None:
    (root / "imagesTr/phantom_001.nii.gz").unlink()
    _edit(root, lambda training: training.pop(1))


def _with_nine(array: np.ndarray) -> np.ndarray:
    array[0, 0, 0] = 9
    return array


def _twin(root: Path) -> None:
    for folder in ("imagesTr", "labelsTr"):
        shutil.copy(root / folder / "phantom_001.nii.gz", root / folder / "twin.nii.gz")
    twin = {"image": "imagesTr/twin.nii.gz", "label": "labelsTr/twin.nii.gz"}
    _edit(root, lambda training: training.append(twin))


def _refused(number: int, what: str, make: Callable[[Path], Path], says: str) -> Case:
    """By training and by `check`."""
    trained = refused(number, what, make, says, train, "train and check refuse", scan=False)

    def check(folder: Path) -> None:
        trained.check(folder)
        code, out, err = call("check", folder / "given/set")
        assert code == 2, (out, err)
        assert re.search(rf"error: {re.escape(str(folder))}.*({says})", out), out

    return Case(number, what, trained.must, check)


def _accepted(number: int, what: str, make: Callable[[Path], Path], says: str, must: str) -> Case:
    """By training and by `check`, which both say so."""

    def check(folder: Path) -> None:
        root = make(folder)
        before = files(folder)
        code, out, err = call(*train(root))
        assert code == 0, (out, err)
        assert files(folder) == before
        code, listed, _ = call("check", root)
        assert code == 0, listed
        for told in (err, listed):
            assert re.search(rf"(warning|note): .*({says})", told), told

    return Case(number, what, must, check)


CASES = [
    _refused(
        59,
        "a label of another shape than its image",
        _label(lambda array: array[:-1]),
        "labelsTr/phantom_001.nii.gz: its shape is .*phantom_001",
    ),
    _refused(
        60,
        "a label 5 micrometres off its image",
        _label(lambda array: array, shift_mm=0.005),
        "labelsTr/phantom_001.nii.gz: its affine differs",
    ),
    _refused(61, "an undeclared value", _label(_with_nine), r"labelsTr/phantom_001.nii.gz: .*\b9\b"),
    _refused(
        62,
        "fractions",
        _label(lambda array: array.astype(np.float32) / 2),
        "labelsTr/phantom_001.nii.gz: .*fractions",
    ),
    _accepted(63, "an empty label", _label(np.zeros_like), "1 of 4 cases show no structure|empty", "accept, count"),
    _accepted(64, "a label that is all foreground", _label(np.ones_like), "every voxel is labelled", "warn"),
    _refused(
        65,
        "an image without a label",
        _set(_unlabelled),
        "no label",
    ),
    _refused(
        65,
        "a label without an image",
        _set(_imageless),
        "it is a label without image",
    ),
    _refused(
        65,
        "a case listed twice",
        _description(lambda training: training.append(training[1])),
        "cases share a name: phantom_001",
    ),
    _refused(65, "a case under two names", _set(_twin), "the same scan under several names: phantom_001, twin"),
]
