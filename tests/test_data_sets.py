"""Data sets of every layout, from their files to a step of training."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
import yaml

from medseg_diff.config import Config
from medseg_diff.config_file import load_config, parse_config
from medseg_diff.datasets.check import check, write_config
from medseg_diff.datasets.layouts import read_dataset
from medseg_diff.datasets.phantom import make_phantom
from medseg_diff.errors import UserError
from medseg_diff.train import rehearse, train

CPU = torch.device("cpu")
SMALL = ["network.widths=[8,8,8,8]", "train.steps=2", "train.validations=1", "segment.samples=2", "tracking.uri=''"]
SHAPE = (20, 18, 16)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets") / "phantom"
    make_phantom(folder, 5, "ct", 1, 0)
    return folder


@pytest.fixture
def root(phantom: Path, tmp_path: Path) -> Path:
    return shutil.copytree(phantom, tmp_path / "set")


def settings(root: Path, **data: object) -> Config:
    content = {
        "data": {"root": str(root), "cache": str(root.parent / "cache"), "size": [16, 16, 16], **data},
        "network": {"widths": [8, 8, 8, 8]},
        "train": {"steps": 2, "validations": 1, "batch_size": 1},
        "segment": {"samples": 2},
        "tracking": {"uri": ""},
    }
    return parse_config(content, "test")


def proposed(path: Path, folder: Path) -> Config:
    """What `check` proposes, made small."""
    problems, contents = check(path)
    assert not [problem for problem in problems if problem.level == "error"]
    write_config(contents, folder / "config.yaml")
    return load_config(folder / "config.yaml", [*SMALL, f"data.cache={folder / 'cache'}"])


def test_what_check_proposes_trains(phantom: Path, tmp_path: Path):
    config = proposed(phantom, tmp_path)
    assert (config.data.modality, config.data.spatial_dims, config.data.folds) == ("ct", 3, 5)
    assert train(config, tmp_path / "run", CPU)["steps"] == 2
    with pytest.raises(UserError, match="it is there already"):
        write_config(check(phantom)[1], tmp_path / "config.yaml")


def test_what_check_proposes_for_the_real_set_trains(hippocampus: Path, tmp_path: Path):
    few = tmp_path / "few"
    listed = json.loads((hippocampus / "dataset.json").read_text())
    listed["training"] = listed["training"][:4]
    for entry in listed["training"]:
        for path in entry.values():
            (few / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hippocampus / path, few / path)
    (few / "dataset.json").write_text(json.dumps(listed))
    config = proposed(few, tmp_path)
    assert (config.data.modality, config.data.spacing_mm, config.data.folds) == ("mr", (1.0, 1.0, 1.0), 4)
    assert config.data.size == (32, 48, 32), "that of configs/hippocampus.yaml"
    assert train(config, tmp_path / "run", CPU)["steps"] == 2


def test_nothing_is_proposed_for_a_set_with_errors(root: Path, tmp_path: Path):
    next((root / "labelsTr").iterdir()).unlink()
    with pytest.raises(UserError, match="Mend the errors first"):
        write_config(check(root)[1], tmp_path / "config.yaml")
    assert not (tmp_path / "config.yaml").exists()


def write(path: Path, array: np.ndarray, spacing_mm: tuple[float, ...] = (1.0, 1.0, 1.0)) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        sitk.WriteImage(sitk.GetImageFromArray(array, isVector=array.ndim == 3), str(path))
    else:
        nib.save(nib.Nifti1Image(array, np.diag([*spacing_mm, 1.0])), path)
    return str(path)


def noise(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)


def cube(shape: tuple[int, ...] = SHAPE, value: int = 1) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    mask[tuple(slice(n // 4, n // 2) for n in shape)] = value
    return mask


def test_flat_colour_pictures_in_two_folders(tmp_path: Path):
    """RGB is three channels, which nobody names; the proposal is slices without neighbours."""
    root = tmp_path / "retina"
    for i in range(3):
        write(root / f"images/p{i}.png", noise(i, (40, 48, 3)).astype(np.uint8))
        write(root / f"labels/p{i}.png", cube((40, 48), 9))
    (root / "dataset.json").write_text('{"channel_names": {"0": "red", "1": "green", "2": "blue"}}')
    config = proposed(root, tmp_path)
    assert (config.data.spatial_dims, config.data.neighbours, config.data.axis) == (2, 0, 2)
    assert config.data.size == (48, 48) or config.data.size == (48, 32)
    assert "spatial_dims: 2" in rehearse(config, tmp_path / "run", CPU)


def test_thick_slices_are_learned_as_slices(tmp_path: Path):
    for i in range(2):
        write(tmp_path / f"images/k{i}.nii.gz", noise(i, (6, 40, 50)), (5.0, 1.0, 1.0))
        write(tmp_path / f"labels/k{i}.nii.gz", cube((6, 40, 50)), (5.0, 1.0, 1.0))
    data = check(tmp_path)[1]["configuration"]["data"]
    assert (data["spatial_dims"], data["axis"], data["neighbours"]) == (2, 0, 1)
    assert (data["size"], data["spacing_mm"], data["folds"]) == ([32, 48], [5, 1, 1], 2)


def test_the_window_of_a_ct_holds_what_is_labelled(tmp_path: Path):
    """Also where no channel says that it is one; a size that would be too large is shortened."""
    for i in range(2):
        image = np.full((200, 100, 90), -1000.0, np.float32)
        image[50:100, 25:50, 22:45] = np.linspace(43, 87, 50)[:, None, None]
        write(tmp_path / f"images/k{i}.nii.gz", image + i, (1.0, 1.0, 1.0))
        write(tmp_path / f"labels/k{i}.nii.gz", cube((200, 100, 90)))
    data = check(tmp_path)[1]["configuration"]["data"]
    assert (data["modality"], data["window_hu"]) == ("ct", [40, 90])
    assert data["size"] == [80, 80, 80]


def test_a_table_with_channels_raters_and_a_split(tmp_path: Path):
    lines = ["T1,T2,label,split"]
    for i in range(3):
        channels = [write(tmp_path / f"p{i}/{name}.nii.gz", noise(10 * i + j)) for j, name in enumerate(("T1", "T2"))]
        raters = [write(tmp_path / f"p{i}/{name}.nii.gz", cube(value=1 + j)) for j, name in enumerate("ab")]
        lines.append(",".join([*channels, ";".join(raters), "val" if i == 1 else "train"]))
    (tmp_path / "cases.csv").write_text("\n".join(lines))
    with pytest.raises(UserError, match="cases share a name: T1"):
        read_dataset(tmp_path / "cases.csv")
    named = [f"{line},{case}" for line, case in zip(lines, ("case", "p0", "p1", "p2"), strict=True)]
    (tmp_path / "cases.csv").write_text("\n".join(named))
    config = proposed(tmp_path / "cases.csv", tmp_path)
    train(config, tmp_path / "run", CPU)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["data"]["root"].endswith("cases.csv")


def test_the_scan_that_is_validated_is_not_trained_on_under_another_name(root: Path):
    shutil.copy(root / "imagesTr/phantom_000.nii.gz", root / "imagesTr/other.nii.gz")
    shutil.copy(root / "labelsTr/phantom_000.nii.gz", root / "labelsTr/other.nii.gz")
    rehearse(settings(root), root.parent / "run", CPU)  # a pair that is left out of the list
    listed = json.loads((root / "dataset.json").read_text())
    listed["training"].append({"image": "imagesTr/other.nii.gz", "label": "labelsTr/other.nii.gz"})
    (root / "dataset.json").write_text(json.dumps(listed))
    with pytest.raises(UserError, match="the same scan under several names: other, phantom_000"):
        rehearse(settings(root), root.parent / "run", CPU)


def relabel(root: Path, change, cases: range = range(5)) -> None:
    for i in cases:
        path = root / f"labelsTr/phantom_{i:03}.nii.gz"
        old = nib.load(path)
        nib.save(nib.Nifti1Image(change(np.asarray(old.dataobj)).astype(np.uint8), old.affine), path)


def test_empty_labels_are_counted_and_full_ones_stand_out(root: Path, capsys: pytest.CaptureFixture):
    relabel(root, np.zeros_like, range(2))
    relabel(root, np.ones_like, range(2, 3))
    rehearse(settings(root, spacing_mm=[4.0, 4.0, 6.0]), root.parent / "run", CPU)
    said = capsys.readouterr().err
    assert "warning: the labels of 2 of 5 cases are empty: phantom_000, phantom_001" in said
    assert "warning: every voxel is labelled in phantom_002" in said
    assert check(root)[1]["empty"] == 2


def test_a_label_to_ignore_counts_nowhere(root: Path, tmp_path: Path):
    """Training and validation go through, and whatever lies below it, the scores are the same."""
    listed = json.loads((root / "dataset.json").read_text())
    listed["labels"]["9"] = "ignore"
    (root / "dataset.json").write_text(json.dumps(listed))

    def hide(label_map: np.ndarray) -> np.ndarray:
        return np.where(np.arange(label_map.shape[0])[:, None, None] < label_map.shape[0] // 2, 9, label_map)

    relabel(root, hide)
    assert not [problem for problem in check(root)[0] if problem.level == "error"]
    assert 9 not in read_dataset(root).labels
    config = settings(root, spacing_mm=[4.0, 4.0, 6.0])
    summary = train(config, tmp_path / "run", CPU)
    assert np.isfinite([summary["val/loss"], summary["val/nll"]]).all()
    pairs = parse_config({"task": "generate", "data": {"root": str(root), "size": [16] * 3, "pairs": True},
                          "network": {"kind": "unconditional"}}, "test")  # fmt: skip
    with pytest.raises(UserError, match="pairs are made of whole masks"):
        rehearse(pairs, tmp_path / "pairs", CPU)
