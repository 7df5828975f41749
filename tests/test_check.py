import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from medseg_diff.datasets import check as module
from medseg_diff.datasets.check import check
from medseg_diff.datasets.phantom import make_phantom


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check") / "sound"
    make_phantom(folder, cases=3, modality="ct", raters=1, seed=0)
    return folder


@pytest.fixture
def root(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "set")


def change_label(root, change, case=1, affine=None, dtype=np.uint8):
    """Rewrite the label of a case; returns its path."""
    path = root / f"labelsTr/phantom_{case:03}.nii.gz"
    old = nib.load(path)
    array = np.asarray(old.dataobj).copy()
    nib.save(nib.Nifti1Image(change(array).astype(dtype), old.affine if affine is None else affine(old.affine)), path)
    return path


def edit(root, change):
    path = root / "dataset.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


def problems_of(path):
    return check(path)[0]


def only(problems, level):
    """The one problem there is, as text."""
    assert [problem.level for problem in problems] == [level], problems
    assert problems[0].advice
    return f"{problems[0].where}: {problems[0].what}"


def test_a_sound_set_has_no_problem(sound):
    assert problems_of(sound) == []


def test_the_real_set_has_no_error(hippocampus):
    assert [problem for problem in problems_of(hippocampus) if problem.level == "error"] == []


def test_shape_names_both(root):
    path = change_label(root, lambda a: a[:-1])
    says = only(problems_of(root), "error")
    assert str(path) in says
    assert "imagesTr/phantom_001.nii.gz" in says
    x, y, z = nib.load(root / "imagesTr/phantom_001.nii.gz").shape
    assert f"{x - 1} x {y} x {z}" in says
    assert f"{x} x {y} x {z}" in says


@pytest.mark.parametrize(("shift_mm", "refused"), [(5e-4, False), (5e-3, True)])
def test_affine_within_a_micrometre(root, shift_mm, refused):
    shift = nib.affines.from_matvec(np.eye(3), [shift_mm, 0, 0])
    change_label(root, lambda a: a, affine=lambda affine: shift @ affine)
    problems = problems_of(root)
    assert bool(problems) is refused
    if refused:
        assert "affine differs" in only(problems, "error")


def test_undeclared_value_names_value_and_file(root):
    def put(array):
        array[0, 0, 0] = 9
        return array

    path = change_label(root, put)
    says = only(problems_of(root), "error")
    assert str(path) in says
    assert says.endswith("not declared: 9")


def test_fractions(root):
    path = change_label(root, lambda a: a * 0.5, dtype=np.float32)
    says = only(problems_of(root), "error")
    assert str(path) in says
    assert "fractions" in says


def test_empty_and_full_labels_are_warnings(root):
    change_label(root, np.zeros_like)
    assert "empty" in only(problems_of(root), "warning")
    change_label(root, np.ones_like)
    assert "every voxel" in only(problems_of(root), "warning")


def test_files_without_partner(root):
    shutil.copy(root / "imagesTr/phantom_000.nii.gz", root / "imagesTr/stray.nii.gz")
    shutil.copy(root / "labelsTr/phantom_000.nii.gz", root / "labelsTr/lost.nii.gz")
    (root / "imagesTr/._phantom_000.nii.gz").write_bytes(b"macOS")
    (root / "imagesTr/notes.txt").write_text("not a scan")
    image, label = problems_of(root)
    assert (image.level, label.level) == ("error", "error")
    assert (image.where, image.what) == (
        str(root / "imagesTr/stray.nii.gz"),
        "it is an image without label that no case lists",
    )
    assert (label.where, label.what) == (
        str(root / "labelsTr/lost.nii.gz"),
        "it is a label without image that no case lists",
    )


def test_a_case_without_label(root):
    edit(root, lambda d: d["training"][0].pop("label"))
    assert {problem.what for problem in problems_of(root)} == {
        "it has no label",
        "it is a label without image that no case lists",
    }


def test_one_scan_under_two_names_also_when_compressed_anew(root):
    old = nib.load(root / "imagesTr/phantom_000.nii.gz")
    nib.save(old, root / "imagesTr/twin.nii")
    edit(
        root,
        lambda d: d["training"].append({"image": "imagesTr/twin.nii", "label": "labelsTr/phantom_000.nii.gz"}),
    )
    assert "phantom_000, twin" in only(problems_of(root), "error")


def test_a_class_that_never_appears(root):
    edit(root, lambda d: d["labels"].update({"7": "spleen"}))
    assert "label 7 (spleen)" in only(problems_of(root), "warning")


def test_an_unusual_spacing(root):
    for folder in ("imagesTr", "labelsTr"):
        path = root / folder / "phantom_002.nii.gz"
        old = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(old.dataobj), old.affine @ np.diag([10, 10, 10, 1])), path)
    assert "phantom_002" in only(problems_of(root), "warning")


def test_everything_at_once(root):
    """Six faults in one set: none hides another."""
    edit(root, lambda d: d["training"].append({"image": "../out.nii", "label": "x"}))
    edit(root, lambda d: d["training"].append({"image": "imagesTr/gone.nii", "label": "labelsTr/gone.nii"}))
    (root / "imagesTr/phantom_000.nii.gz").write_bytes(b"")
    change_label(root, lambda a: a * 0 + 8, case=0)
    change_label(root, lambda a: a[1:], case=1)
    (root / "labelsTr/phantom_002.nii.gz").write_bytes(b"junk")
    problems = problems_of(root)
    says = " ".join(f"{problem.where}: {problem.what}" for problem in problems)
    for part in (
        "leads outside", "gone.nii", "imagesTr/phantom_000", "not declared: 8", "its shape is", "labelsTr/phantom_002",
    ):  # fmt: skip
        assert part in says


def test_a_set_without_description(root):
    (root / "dataset.json").unlink()
    assert "no dataset.json" in only(problems_of(root), "error")


def test_single_scans(sound, tmp_path):
    good = sound / "imagesTr/phantom_000.nii.gz"
    assert problems_of(good) == []
    (tmp_path / "cut.nii.gz").write_bytes(good.read_bytes()[:5000])
    (tmp_path / "none.nii.gz").write_bytes(b"")
    assert [problem.where.split("/")[-1] for problem in problems_of(tmp_path)] == ["cut.nii.gz", "none.nii.gz"]
    assert "absent.nii" in only(problems_of(tmp_path / "absent.nii"), "error")


def test_a_scan_that_had_to_be_mended_is_a_warning(tmp_path):
    array = np.random.default_rng(0).normal(size=(8, 8, 8)).astype(np.float32)
    array[0, 0, 0] = np.nan
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "nan.nii.gz")
    assert "NaN" in only(problems_of(tmp_path / "nan.nii.gz"), "warning")


def test_a_warning_of_many_files_stands_once(tmp_path):
    for i in range(3):
        nib.save(nib.Nifti1Image(np.full((4, 4, 4), 7, np.int16), np.eye(4)), tmp_path / f"{i}.nii.gz")
    assert "there is nothing to segment (and 2 more files)" in only(problems_of(tmp_path), "warning")


def test_a_dicom_series(dicom):
    series = next(folder for folder in sorted(dicom.iterdir()) if folder.is_dir())
    assert [problem for problem in problems_of(series) if problem.level == "error"] == []


def test_fingerprint_against_hand_counts(root):
    affine = np.diag([2.0, 1.0, 1.0, 1.0])
    drawn = np.zeros((4, 5, 6), np.uint8)
    drawn[:2, :5, :1] = 1
    for i in range(3):
        image = np.full((4, 5, 6), 6 + i, np.int16)
        nib.save(nib.Nifti1Image(image, affine), root / f"imagesTr/phantom_{i:03}.nii.gz")
        nib.save(nib.Nifti1Image(drawn, affine), root / f"labelsTr/phantom_{i:03}.nii.gz")
    found = check(root)[1]
    assert (found["cases"], found["raters"]) == (3, [1])
    assert found["shape"]["median"] == [4, 5, 6]
    assert found["spacing_mm"]["max"] == pytest.approx([2, 1, 1])
    assert found["intensity_percentile"]["CT"]["50"] == {"median": 7, "min": 6, "max": 8}
    assert found["volume_ml"]["organ"]["median"] == pytest.approx(10 * 2 / 1000)
    assert (found["volume_ml"]["organ"]["files"], found["volume_ml"]["lesion"]) == (3, {"files": 0})
    assert json.dumps(found)


def test_contents_are_told_of_sound_sets_alone_and_read_once(root, monkeypatch):
    read = []
    for name in ("read_case", "read_label_map"):
        reader = getattr(module, name)
        monkeypatch.setattr(module, name, lambda what, *rest, reader=reader: read.append(what) or reader(what, *rest))
    assert check(root)[1]["cases"] == 3
    assert len(read) == len(set(read)) == 6
    (root / "labelsTr/phantom_002.nii.gz").write_bytes(b"junk")
    assert check(root)[1] is None
    assert check(root / "imagesTr/phantom_000.nii.gz") == ([], None)
