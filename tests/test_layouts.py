import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from monai.data import load_decathlon_datalist
from monai.transforms import LoadImage

from medseg_diff.datasets.layouts import digest, read_dataset, split, survey
from medseg_diff.datasets.reading import read_case, read_reference
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


def rename(root, change):
    for path in sorted((root / "imagesTr").iterdir()):
        path.rename(path.with_name(change(path.name)))


NNUNET = {"labels": {"background": 0, "bone": 7}, "training": None, "modality": None, "file_ending": ".nii.gz"}


def test_nnunet_layout_names_its_files(tmp_path):
    write(tmp_path, **NNUNET, channel_names={"0": "CT"})
    rename(tmp_path, lambda name: name.replace(".nii", "_0000.nii"))
    (tmp_path / "imagesTr/._k1_0000.nii.gz").touch()
    dataset = read_dataset(tmp_path)
    assert dataset.labels == {0: "background", 7: "bone"}
    assert [case.name for case in dataset.cases] == ["k1", "k10", "k2"]
    assert dataset.cases[0].labels == (tmp_path / "labelsTr/k1.nii.gz",)
    assert dataset.modality == "CT"


def test_nnunet_with_a_file_a_channel(tmp_path):
    write(tmp_path, **NNUNET, channel_names={"0": "T1", "1": "T2"})
    rename(tmp_path, lambda name: name.replace(".nii", "_0000.nii"))
    for path in sorted((tmp_path / "imagesTr").iterdir()):
        shutil.copy(path, str(path).replace("_0000", "_0001"))
    dataset = read_dataset(tmp_path)
    assert dataset.channels == ("T1", "T2")
    assert [path.name for path in dataset.cases[0].images] == ["k1_0000.nii.gz", "k1_0001.nii.gz"]
    (tmp_path / "imagesTr/k2_0001.nii.gz").unlink()
    assert "1 listed file(s) are missing: imagesTr/k2_0001.nii.gz" in refusal(tmp_path)
    for path in (tmp_path / "imagesTr").glob("*_0001*"):
        path.unlink()
    assert read_dataset(tmp_path).cases[0].further == (), "all channels in the first file"


def test_nnunet_version_1_lists_names_without_numbers(tmp_path):
    write(tmp_path, modality={"0": "T1", "1": "T2"}, labels={"0": "background", "1": "bone"})
    rename(tmp_path, lambda name: name.replace(".nii", "_0000.nii"))
    for path in sorted((tmp_path / "imagesTr").iterdir()):
        shutil.copy(path, str(path).replace("_0000", "_0001"))
    case = read_dataset(tmp_path).cases[0]
    assert case.name == "k1"
    assert [path.name for path in case.images] == ["k1_0000.nii.gz", "k1_0001.nii.gz"]


def test_nnunet_lists_its_files_under_dataset(tmp_path):
    listed = {"a": {"images": ["imagesTr/k1.nii.gz"], "label": "labelsTr/k1.nii.gz"}}
    for i in (2, 10):
        listed[f"k{i}"] = {"images": [f"imagesTr/k{i}.nii.gz"], "label": f"labelsTr/k{i}.nii.gz"}
    write(tmp_path, **NNUNET, channel_names={"0": "T1"}, dataset=listed)
    assert [case.name for case in read_dataset(tmp_path).cases] == ["a", "k10", "k2"]


@pytest.mark.parametrize("labels", [{"background": 0, "bone": 1, "ignore": 2}, {"0": "bg", "1": "bone", "2": "Ignore"}])
def test_a_label_named_ignore_is_none_to_learn(tmp_path, labels):
    dataset = read_dataset(write(tmp_path, labels=labels))
    assert list(dataset.labels) == [0, 1]
    assert {case.ignore for case in dataset.cases} == {2}


def test_channels_by_name(tmp_path):
    image = {"T2": "imagesTr/k2.nii.gz", "T1": "imagesTr/k1.nii.gz"}
    write(tmp_path, modality={"0": "T1", "1": "T2"}, training=[{"image": image, "label": "labelsTr/k1.nii.gz"}])
    case = survey(tmp_path)[0].cases[0]
    assert [path.name for path in case.images] == ["k1.nii.gz", "k2.nii.gz"]
    write(tmp_path, modality={"0": "T1", "1": "FLAIR"}, training=[{"image": image}])
    assert "the channels of a case are T2, T1, and T1, FLAIR are declared" in refusal(tmp_path)


def png(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path))


@pytest.fixture
def pictures(tmp_path):
    """images/ and labels/ of 2D files, and nothing that describes them."""
    for i in range(3):
        png(tmp_path / f"images/p{i}.png", np.full((8, 9), 10 * i, np.uint8))
        png(tmp_path / f"labels/p{i}.png", np.eye(8, 9, dtype=np.uint8) * 5 * i)
    return tmp_path


def test_two_folders_paired_by_name(pictures):
    dataset = read_dataset(pictures)
    assert [case.name for case in dataset.cases] == ["p0", "p1", "p2"]
    assert dataset.cases[1].labels == (pictures / "labels/p1.png",)
    assert dataset.labels == {0: "background", 5: "label 5", 10: "label 10"}
    described = {"labels": {"background": 0, "vessel": 5, "ignore": 10}, "channel_names": {"0": "retina"}}
    (pictures / "dataset.json").write_text(json.dumps(described))
    dataset = read_dataset(pictures)
    assert (dataset.labels, dataset.channels) == ({0: "background", 5: "vessel"}, ("retina",))
    assert dataset.cases[0].ignore == 10


def test_folders_that_do_not_pair_are_refused_by_both_names(pictures):
    (pictures / "labels/p1.png").rename(pictures / "labels/q1.png")
    message = refusal(pictures)
    assert "images/p1.png without a label" in message
    assert "labels/q1.png without an image" in message


def table(root, text):
    (root / "dataset.csv").write_text(text)
    return root


def test_a_table_of_cases(tmp_path):
    write(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": GOOD["labels"]}))
    head = "case,T1,T2,label,label_ben,split\n"
    files = [f"imagesTr/k{i}.nii.gz,imagesTr/k2.nii.gz,labelsTr/k1.nii.gz" for i in (1, 10)]
    table(tmp_path, f"{head}anna,{files[0]};labelsTr/k10.nii.gz,,val\nzoe,{files[1]},labelsTr/k2.nii.gz,train\n")
    for root in (tmp_path, tmp_path / "dataset.csv"):
        dataset = read_dataset(root)
        assert (dataset.channels, dataset.root, len(dataset.labels)) == (("T1", "T2"), tmp_path, 3)
        anna, zoe = dataset.cases
        assert [path.name for path in anna.images] == ["k1.nii.gz", "k2.nii.gz"]
        assert [path.name for path in anna.labels] == ["k1.nii.gz", "k10.nii.gz"]
        assert [path.name for path in zoe.labels] == ["k1.nii.gz", "k2.nii.gz"]
        assert split(dataset, 5, 0) == ((zoe,), (anna,))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("label,split\n", "does not name an image"),
        ("image,label,label\n", "once each"),
        ("image,label\nimagesTr/k1.nii.gz\n", "line 2: it does not give"),
        ("image,label\nimagesTr/k1.nii.gz,labelsTr/k1.nii.gz,3\n", "line 2: it does not give"),
        ("image,label\nimagesTr/k1.nii.gz,\n,labelsTr/k1.nii.gz\n", "line 3: it does not give"),
        ("image,label,split\nimagesTr/k1.nii.gz,labelsTr/k1.nii.gz,test\n", "the split of k1 is test"),
        ("image\nimagesTr/k1.nii.gz\nimagesTr/k1.nii.gz\n", "cases share a name: k1"),
        ("image\n../k1.nii.gz\n", "leads outside"),
        ("image\nimagesTr/none.nii.gz\n", "imagesTr/none.nii.gz"),
        ("image\n", "no training cases"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path, text, says):
    write(tmp_path)
    (tmp_path / "dataset.json").unlink()
    assert says in refusal(table(tmp_path, text))


def test_a_split_is_for_all_cases_or_for_none(tmp_path):
    write(tmp_path)
    (tmp_path / "dataset.json").unlink()
    lines = [f"imagesTr/k{i}.nii.gz,{part}" for i, part in ((1, "train"), (2, "val"), (10, ""))]
    dataset = read_dataset(table(tmp_path, "\n".join(["image,split", *lines])))
    with pytest.raises(UserError, match="1 cases are neither for train nor for val, the first is k10"):
        split(dataset, 5, 0)
    dataset = read_dataset(table(tmp_path, "\n".join(["image,split", lines[0]])))
    with pytest.raises(UserError, match="leaves 1 cases to train on and 0 to validate on"):
        split(dataset, 5, 0)


def test_the_arrays_are_those_of_monai_and_of_simpleitk():
    """MONAI reads as the Decathlon's loader does, SimpleITK as nnU-Net does: axes z, y, x, and positions in LPS."""
    root = Path(__file__).parents[1] / "data/sample"
    listed = load_decathlon_datalist(str(root / "dataset.json"), data_list_key="training")
    for entry in listed:
        case = next(case for case in read_dataset(root).cases if case.image.samefile(entry["image"]))
        scan = read_case(case, 1)
        label_map = read_reference(case.labels[0], scan)
        for array, path in ((scan.array[0], entry["image"]), (label_map, entry["label"])):
            image = LoadImage()(path)
            np.testing.assert_array_equal(array, image.numpy())
            np.testing.assert_allclose(scan.affine, image.affine, atol=1e-6)
            image = sitk.ReadImage(path)
            np.testing.assert_array_equal(array, sitk.GetArrayFromImage(image).T)
            last = np.array(array.shape) - 1
            place = np.array(image.TransformIndexToPhysicalPoint(last.tolist())) * (-1, -1, 1)
            np.testing.assert_allclose(scan.affine @ [*last, 1], [*place, 1], atol=1e-4)


def test_a_label_a_rater_and_none(tmp_path):
    raters = ["labelsTr/k1.nii.gz", "labelsTr/k2.nii.gz"]
    write(tmp_path, training=[{"image": "imagesTr/k1.nii.gz", "label": raters}, {"image": "imagesTr/k2.nii.gz"}])
    first, second = survey(tmp_path)[0].cases
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
        ({"labels": {"background": 0, "bone": [1, 2]}}, "regions of several labels: bone"),
        ({"labels": {"background": 0, "bone": None}}, "does not pair"),
        ({"labels": {"ignore": 0, "bone": 1}}, "Add the background"),
        ({"modality": {"0": "T1", "1": "T1"}}, "same name"),
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
    assert survey(tmp_path)[0].cases[0].name == "K9"


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
    assert len(errors) == 4 + 3
    assert all(part in says for part in ("no background", "'modality' is missing", "leads outside", "no.nii"))
    assert says.count("no case lists") == 3
    with pytest.raises(UserError, match="medseg-diff check names 6 more"):
        read_dataset(tmp_path)
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
