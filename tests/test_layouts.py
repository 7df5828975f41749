import json
import shutil

import pytest

from medseg_diff.datasets.layouts import digest, read_dataset, split, survey
from medseg_diff.errors import UserError

GOOD = {
    "name": "Knees",
    "modality": {"0": "MRI"},
    "labels": {"0": "background", "205": "cartilage", "7": "bone"},
    "training": [{"image": f"./imagesTr/k{i}.nii.gz", "label": f"./labelsTr/k{i}.nii.gz"} for i in (10, 2, 1)],
}


def write(root, **changes):
    """A data set of empty files, with changes to its dataset.json; None removes a key."""
    description = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in (10, 2, 1):
            (root / folder / f"k{i}.nii.gz").write_bytes(f"{folder}{i}".encode())
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def refusal(root):
    with pytest.raises(UserError) as caught:
        read_dataset(root)
    return str(caught.value)


def test_decathlon_layout(tmp_path):
    dataset = read_dataset(write(tmp_path))
    assert dataset.labels == {0: "background", 7: "bone", 205: "cartilage"}
    assert list(dataset.labels) == [0, 7, 205]
    assert [case.name for case in dataset.cases] == ["k1", "k10", "k2"]
    assert dataset.cases[1].image == tmp_path / "imagesTr/k10.nii.gz"
    assert dataset.cases[1].labels == (tmp_path / "labelsTr/k10.nii.gz",)
    assert (dataset.name, dataset.channels, dataset.modality) == ("Knees", ("MRI",), "MRI")


def test_the_real_set_is_read(hippocampus):
    dataset = read_dataset(hippocampus)
    assert dataset.labels == {0: "background", 1: "Anterior", 2: "Posterior"}
    training, validation = split(dataset, folds=5, fold=0)
    assert (len(training), len(validation), validation[0].name) == (160, 40, "hippocampus_001")


def test_nnunet_layout_names_its_files(tmp_path):
    write(
        tmp_path, labels={"background": 0, "bone": 7}, training=None, modality=None, channel_names={"0": "CT"},
        file_ending=".nii.gz",
    )  # fmt: skip
    for path in (tmp_path / "imagesTr").iterdir():
        path.rename(path.with_name(path.name.replace(".nii", "_0000.nii")))
    (tmp_path / "imagesTr/._k1_0000.nii.gz").touch()
    dataset = read_dataset(tmp_path)
    assert dataset.labels == {0: "background", 7: "bone"}
    assert [case.name for case in dataset.cases] == ["k1", "k10", "k2"]
    assert dataset.cases[0].labels == (tmp_path / "labelsTr/k1.nii.gz",)
    assert dataset.modality == "CT"


def test_a_label_a_rater_and_none(tmp_path):
    raters = ["labelsTr/k1.nii.gz", "labelsTr/k2.nii.gz"]
    write(tmp_path, training=[{"image": "imagesTr/k1.nii.gz", "label": raters}, {"image": "imagesTr/k2.nii.gz"}])
    first, second = read_dataset(tmp_path).cases
    assert first.labels == (tmp_path / raters[0], tmp_path / raters[1])
    assert second.labels == ()


def test_hidden_files_are_ignored(tmp_path):
    hidden = {"image": "./imagesTr/._k1.nii.gz", "label": "./labelsTr/._k1.nii.gz"}
    write(tmp_path, training=[hidden, *GOOD["training"]])
    assert len(read_dataset(tmp_path).cases) == 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"labels": None}, "'labels' is missing"),
        ({"training": None}, "'training' is missing"),
        ({"modality": None}, "'modality' is missing"),
        ({"training": []}, "no training cases"),
        ({"training": {"image": "x"}}, "'training' is no list"),
        ({"training": ["imagesTr/k1.nii.gz"]}, "names no image"),
        ({"training": [{"image": "imagesTr/k1.nii.gz", "label": [3]}]}, "no list of paths"),
        ({"training": GOOD["training"] * 2}, "share a name: k1, k10, k2"),
        ({"training": [{"image": "imagesTr/../../k1.nii.gz"}]}, "leads outside"),
        ({"training": [{"image": "/etc/passwd"}]}, "leads outside"),
        ({"labels": {"1": "bone"}}, "Add the background"),
        ({"labels": {"background": 0, "bone": 1, "joint": 1}}, "same value"),
        ({"labels": {"background": 0, "bone": [1, 2]}}, "does not pair"),
        ({"labels": {"background": 0, "bone": 1.5}}, "does not pair"),
        ({"labels": {"background": 0, "bone": -1}}, "a label has the value -1"),
        ({"labels": {"background": 0, "bone": 32768}}, "a label has the value 32768"),
        ({"modality": {"1": "CT"}}, "does not number the channels"),
    ],
)
def test_a_wrong_description_is_refused(tmp_path, changes, says):
    assert says in refusal(write(tmp_path, **changes))


def test_a_case_has_the_name_of_its_outputs(tmp_path):
    write(tmp_path, training=[{"image": "imagesTr/K9.NII.GZ"}])
    (tmp_path / "imagesTr/K9.NII.GZ").touch()
    assert read_dataset(tmp_path).cases[0].name == "K9"


def test_missing_files_are_counted_and_named(tmp_path):
    write(tmp_path)
    shutil.rmtree(tmp_path / "labelsTr")
    (tmp_path / "imagesTr/k2.nii.gz").unlink()
    message = refusal(tmp_path)
    assert "4 listed file(s) are missing" in message
    assert all(name in message for name in ("labelsTr/k1.nii.gz", "labelsTr/k10.nii.gz", "imagesTr/k2.nii.gz"))


def test_no_or_bad_json(tmp_path):
    assert "no dataset.json" in refusal(tmp_path)
    write(tmp_path)
    (tmp_path / "dataset.json").write_text('{\n"labels": {},\n oops }')
    assert "line 3" in refusal(tmp_path)
    (tmp_path / "dataset.json").write_bytes(b'{"name": "\xff"}')
    assert "UTF-8" in refusal(tmp_path)


def test_survey_finds_every_error_at_once(tmp_path):
    write(tmp_path, labels={"1": "bone"}, modality=None, training=[{"image": "../x.nii"}, {"image": "imagesTr/no.nii"}])
    dataset, errors = survey(tmp_path)
    says = " ".join(map(str, errors))
    assert len(errors) == 4
    assert all(part in says for part in ("no background", "'modality' is missing", "leads outside", "no.nii"))
    assert [case.name for case in dataset.cases] == ["no"]


def test_split_by_index_of_the_sorted_names(tmp_path):
    dataset = read_dataset(write(tmp_path))
    training, validation = split(dataset, folds=2, fold=1)
    assert [case.name for case in training] == ["k1", "k2"]
    assert [case.name for case in validation] == ["k10"]
    for folds, fold in ((1, 0), (5, 4), (2, 2)):
        with pytest.raises(UserError, match=r"data\.folds"):
            split(dataset, folds, fold)


def test_digest_tells_content_not_place(tmp_path):
    here, there = write(tmp_path / "here"), write(tmp_path / "there", name="Other")
    digests = [digest(read_dataset(here)), digest(read_dataset(there))]
    assert digests[0] == digests[1]
    (there / "labelsTr/k2.nii.gz").write_bytes(b"changed")
    digests.append(digest(read_dataset(there)))
    digests.append(digest(read_dataset(write(there, labels={"0": "background", "7": "femur"}))))
    assert len(set(digests)) == 3
