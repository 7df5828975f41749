import os
import zipfile
from pathlib import Path

import pytest

from medseg_diff.errors import UserError
from medseg_diff.scans.find import Source, find_scans, opened

DICOM = bytes(128) + b"DICM"


def make(root: Path, *names: str) -> None:
    """Files that are told apart by their names, and by their first bytes if they end with .dcm."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(DICOM if name.endswith(".dcm") else b"")


def zipped(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, DICOM if name.endswith(".dcm") else b"")
    return path


def results(*paths: Path, apart: Path | None = None) -> list[str]:
    return [str(source.under / source.name) for source in find_scans(list(paths), apart)]


def test_a_folder_stands_for_its_scans(tmp_path):
    make(tmp_path, "b.nii.gz", "a.mha", "notes.txt", ".hidden.nii")
    (tmp_path / "empty").mkdir()
    assert [source.path for source in find_scans([tmp_path])] == [tmp_path / "a.mha", tmp_path / "b.nii.gz"]
    for alone in (tmp_path / name for name in ("empty", "absent.nii", "notes.txt", 300 * "a" + ".nii")):
        assert find_scans([alone]) == [Source(alone, alone)]
    make(tmp_path, "a.nrrd")
    with pytest.raises(UserError, match="would overwrite"):
        find_scans([tmp_path])


def test_results_lie_as_their_scans_do(tmp_path):
    make(tmp_path, "p1/ct.nii.gz", "p2/ct.nii.gz", "p2/day2/ct.nii.gz", "p3/dicom/s1/1.dcm", "p3/dicom/s2/1.dcm")
    assert results(tmp_path) == ["p1/ct", "p2/ct", "p2/day2/ct", "p3/dicom/s1", "p3/dicom/s2"]
    assert results(tmp_path / "p2") == ["ct", "day2/ct"]


def test_labels_and_our_own_results_are_no_scans(tmp_path):
    make(tmp_path, "set/imagesTr/a.nii.gz", "set/imagesTs/b.nii.gz", "set/labelsTr/a.nii.gz", "set/dataset.json")
    assert results(tmp_path / "set") == ["imagesTr/a", "imagesTs/b"]
    assert results(tmp_path / "set/labelsTr") == ["a"]
    make(tmp_path, "here/a.nii.gz", *(f"here/a_{end}" for end in ("seg.nii.gz", "preview.png", "prob.nii.gz")))
    assert results(tmp_path / "here") == ["a"]
    make(tmp_path, "here/segmentations/a_seg.nii.gz")
    assert results(tmp_path / "here", apart=tmp_path / "here/segmentations") == ["a"]


def test_a_stray_dicom_file_hides_no_scan(tmp_path):
    """Results lie beside each other as knee_seg.nii.gz and knee_seg.dcm; a series is a folder of DICOM files alone."""
    make(tmp_path, "series/knee_seg.dcm", "results/knee_seg.dcm", "results/knee_seg.nii.gz")
    assert results(tmp_path) == ["results/knee_seg", "series"]


def test_a_link_that_leads_round_is_not_followed(tmp_path):
    make(tmp_path, "a/ct.nii")
    (tmp_path / "a/again").symlink_to(tmp_path)
    assert results(tmp_path) == ["a/ct"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_one_refusal(tmp_path):
    make(tmp_path, "open/ct.nii", "shut/ct.nii")
    (tmp_path / "shut").chmod(0)
    assert results(tmp_path) == ["open/ct", "shut"]


def test_our_own_results_beside_a_scan_are_no_scans(tmp_path):
    make(tmp_path, "a.nrrd", "a_seg.nrrd", "a.seg.nrrd", "a_label_7_core.nrrd", "a_prob.nii.gz", "b_seg.nii.gz")
    assert results(tmp_path) == ["a", "b_seg"]


def test_an_archive_of_volumes_holds_several_scans(tmp_path):
    archive = zipped(tmp_path / "clinic.zip", "p1/ct.nii.gz", "p2/ct.nii.gz", "readme.txt")
    (source,) = find_scans([archive])
    with opened(source) as held:
        assert [str(one.under / one.name) for one in held] == ["clinic/p1/ct", "clinic/p2/ct"]
        assert [one.shown for one in held] == [archive / "p1/ct.nii.gz", archive / "p2/ct.nii.gz"]
        assert all(one.path.is_file() for one in held)
    assert not any(one.path.exists() for one in held)


def test_other_archives_are_themselves(tmp_path):
    (tmp_path / "broken.zip").write_bytes(b"PK\3\4 and no more")
    for path in (zipped(tmp_path / "series.zip", "1.dcm"), tmp_path / "broken.zip"):
        source = Source(path, path)
        with opened(source) as held:
            assert held == [source]


def test_a_zip_whose_offsets_lie_is_refused(tmp_path):
    """Python seeks before the start of the file then, and gets an OSError that is none of the disk's."""
    path = zipped(tmp_path / "lies.zip", "a.nii")
    content = bytearray(path.read_bytes())
    place = content.index(b"PK\5\6") + 16
    content[place : place + 4] = (int.from_bytes(content[place : place + 4], "little") + 9).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"), opened(Source(path, path)):
        pass
