import dataclasses
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medseg_diff.datasets import cache
from medseg_diff.datasets.cache import Volume, load_volumes
from medseg_diff.datasets.layouts import Case
from medseg_diff.datasets.pipeline import Preprocessing
from medseg_diff.diffusion.masks import IGNORED
from medseg_diff.errors import UserError

MR = Preprocessing((1.0, 1.0, 1.0), "mr", (-160.0, 240.0), (0.5, 99.5))
CT = Preprocessing((1.0, 1.0, 1.0), "ct", (-160.0, 240.0), (0.5, 99.5))
VALUES = (0, 7, 205)


def write(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.Nifti1Image(array, np.diag([1, 1, 2.0, 1]) if affine is None else affine).to_filename(path)
    return path


def labels_of(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array(VALUES, np.uint8), (8, 6, 5))


@pytest.fixture
def case(tmp_path: Path) -> Case:
    image = np.random.default_rng(0).normal(size=(8, 6, 5)).astype(np.float32)
    return Case("a", write(tmp_path / "a.nii.gz", image), (write(tmp_path / "a_seg.nii.gz", labels_of()),))


def load(case: Case, how: Preprocessing = MR, values: tuple[int, ...] = VALUES, channels: int = 1) -> Volume:
    folder = case.image.parent / "cache"
    (volume,) = load_volumes([case], how, values=values, channels=channels, folder=folder)
    return volume


def cached(case: Case) -> dict[str, int]:
    """Names and times of the files in the cache."""
    return {path.name: path.stat().st_mtime_ns for path in (case.image.parent / "cache").iterdir()}


def test_a_case_on_the_network_s_grid(case: Case):
    volume = load(case)
    assert volume.name == "a"
    assert volume.image.shape == (1, 8, 6, 9)
    assert volume.labels.shape == (1, 8, 6, 9)
    assert float(volume.image.mean()) == pytest.approx(0, abs=1e-5)
    wanted = np.searchsorted(VALUES, labels_of())
    np.testing.assert_array_equal(volume.labels[0][..., ::2], wanted)  # the slices that are the file's own
    for index, centres in enumerate(volume.centres, start=1):
        assert len(centres) > 10
        assert (volume.labels[0].numpy()[tuple(centres.T)] == index).all()


def test_the_second_time_nothing_is_prepared(case: Case, monkeypatch: pytest.MonkeyPatch):
    first, before = load(case), cached(case)
    assert len(before) == 2
    monkeypatch.setattr(cache, "_prepare", None)
    second = load(case)
    assert cached(case) == before
    assert torch.equal(first.image, second.image)
    assert torch.equal(first.labels, second.labels)


def test_what_training_does_to_a_volume_does_not_reach_the_cache(case: Case):
    load(case).image.zero_()
    assert load(case).image.abs().max() > 1


def test_a_changed_file_is_noticed(case: Case):
    image, labels = load(case).image.clone(), load(case).labels.clone()
    times = case.image.stat()
    write(case.image, np.random.default_rng(9).normal(size=(8, 6, 5)).astype(np.float32))
    os.utime(case.image, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert not torch.equal(load(case).image, image)
    write(case.labels[0], labels_of(seed=2))
    assert not torch.equal(load(case).labels, labels)
    assert len(cached(case)) == 6


def test_a_changed_transform_is_noticed(case: Case, monkeypatch: pytest.MonkeyPatch):
    seen = {frozenset(cached(case)) for _ in [load(case)]}
    other_mr = Preprocessing((1.0, 1.0, 1.0), "mr", (-160.0, 240.0), (1.0, 99.0))
    for how in (CT, other_mr, Preprocessing((1.0, 1.0, 2.0), "mr", (-160.0, 240.0), (0.5, 99.5))):
        load(case, how)
        seen.add(frozenset(cached(case)))
    load(case, values=(0, 6, 7, 205))
    seen.add(frozenset(cached(case)))
    monkeypatch.setattr(cache, "CODE", "another program")
    load(case)
    seen.add(frozenset(cached(case)))
    assert len(seen) == 6
    assert sorted(map(len, seen)) == [2, 4, 6, 8, 10, 12]


def test_a_changed_program_is_noticed(tmp_path: Path):
    package = shutil.copytree(Path(cache.__file__).parents[1], tmp_path / "medseg_diff")
    codes = {cache.CODE, cache.code_digest(package)}
    assert len(codes) == 1
    for source in ("scans/nifti.py", "scans/geometry.py", "datasets/pipeline.py", "datasets/cache.py"):
        with (package / source).open("a") as file:
            file.write("# mended")
        codes.add(cache.code_digest(package))
    assert len(codes) == 5


def test_another_version_is_another_program(monkeypatch: pytest.MonkeyPatch):
    package = Path(cache.__file__).parents[1]
    monkeypatch.setattr("medseg_diff.__version__", "0.0.7")
    assert cache.code_digest(package) != cache.CODE


def test_more_files_than_a_process_may_open_at_first(case: Case):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    folder = case.image.parent / "cache"
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        assert len(load_volumes([case] * 130, MR, values=VALUES, channels=1, folder=folder)) == 130
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_raters_are_kept_apart_and_centres_come_from_all(tmp_path: Path, case: Case):
    empty = write(tmp_path / "b.nii.gz", np.zeros((8, 6, 5), np.uint8))
    volume = load(Case("a", case.image, (empty, *case.labels)))
    assert volume.labels.shape == (2, 8, 6, 9)
    assert not volume.labels[0].any()
    assert volume.labels[1].any()
    assert len(volume.centres) == 2


def test_a_case_without_labels_and_a_label_that_is_nowhere(tmp_path: Path, case: Case):
    volume = load(Case("a", case.image, ()))
    assert volume.labels.shape == (0, 8, 6, 9)
    assert volume.centres == ()
    assert len(load(case, values=(0, 6, 7, 205)).centres) == 2


def test_centres_are_spread_over_a_large_structure(monkeypatch: pytest.MonkeyPatch, case: Case):
    monkeypatch.setattr(cache, "SEEDS_PER_CLASS", 20)
    for centres in load(case).centres:
        assert 10 <= len(centres) <= 20
        assert np.ptp(centres[:, 0]) >= 5


def test_labels_that_do_not_fit_are_refused_by_name(tmp_path: Path, case: Case):
    with pytest.raises(UserError, match=r"a_seg\.nii\.gz: it holds label value\(s\) that are not declared: 205\."):
        load(case, values=(0, 7))
    small = write(tmp_path / "small.nii.gz", np.zeros((8, 6, 4), np.uint8))
    with pytest.raises(UserError, match=r"small\.nii\.gz: its shape is 8 x 6 x 4, that of \S+a\.nii\.gz is 8 x 6 x 5"):
        load(Case("a", case.image, (small,)))
    moved = write(
        tmp_path / "moved.nii.gz", labels_of(), np.array([[1, 0, 0, 3], [0, 1, 0, 0], [0, 0, 2, 0], [0] * 3 + [1.0]])
    )
    with pytest.raises(UserError, match=r"moved\.nii\.gz: its affine differs from that of \S+a\.nii\.gz by up to 3"):
        load(Case("a", case.image, (moved,)))
    (tmp_path / "bad.nii.gz").write_bytes(b"no scan")
    with pytest.raises(UserError, match=r"bad\.nii\.gz"):
        load(Case("a", case.image, (tmp_path / "bad.nii.gz",)))
    with pytest.raises(UserError, match=r"bad\.nii\.gz"):
        load(Case("a", tmp_path / "bad.nii.gz", case.labels))
    with pytest.raises(UserError, match=r"a\.nii\.gz.*1 volumes where 2 are read"):
        load(case, channels=2)
    with pytest.raises(UserError, match="257 labels are declared"):
        load(case, values=tuple(range(257)))
    assert not (tmp_path / "cache").exists() or not cached(case)


def test_a_label_whose_header_is_rounded_stays_on_its_image(tmp_path: Path):
    """Where both are resampled, each on a grid of its own, they could come apart by half a voxel."""
    angle = np.radians(17)
    affine = np.diag([1, 1, 2.0, 1])
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    mask = np.zeros((9, 9, 9), np.uint8)
    mask[3:6, 2:7, 3:6] = 1
    image = write(tmp_path / "a.nii.gz", mask.astype(np.float32) * 400 - 160, affine)
    label = write(tmp_path / "b.nii.gz", mask, affine.round(3))
    volume = load(Case("a", image, (label,)), CT, values=(0, 1))
    assert ((volume.image[0] > 0) != (volume.labels[0] > 0)).float().mean() < 0.02


def test_what_is_to_be_ignored_has_an_index_of_its_own(case: Case):
    before = load(case).labels
    volume = load(dataclasses.replace(case, ignore=205), values=(0, 7))
    assert set(volume.labels.unique().tolist()) == {0, 1, IGNORED}
    assert torch.equal(volume.labels == IGNORED, before == 2)
    assert len(volume.centres) == 1, "no crop is centred on it"


def test_a_file_a_channel_is_the_same_as_one_file_for_all(tmp_path: Path, case: Case):
    first, second = np.random.default_rng(3).normal(size=(2, 8, 6, 5)).astype(np.float32)
    both = write(tmp_path / "both.nii.gz", np.stack([first, second], axis=-1))
    files = [write(tmp_path / f"c_{i:04}.nii.gz", array) for i, array in enumerate((first, second))]
    apart = Case("c", files[0], case.labels, further=(files[1],))
    assert torch.equal(load(apart, channels=2).image, load(Case("c", both, case.labels), channels=2).image)
    with pytest.raises(UserError, match="2 files, one a channel, and 3 channels are declared"):
        load(apart, channels=3)
    write(files[1], second, np.diag([1, 1, 3.0, 1]))
    with pytest.raises(UserError, match=r"c_0001\.nii\.gz: its affine differs from that of \S+c_0000"):
        load(apart, channels=2)


def test_a_kill_between_the_files_leaves_nothing_that_counts(case: Case):
    program = f"""
import os, sys
from pathlib import Path
import numpy as np
from medseg_diff.datasets import cache
from medseg_diff.datasets.layouts import Case
from medseg_diff.datasets.pipeline import Preprocessing
save = np.save
def killed(path, array):
    if ".labels" in path.name:
        path.write_bytes(b"half")
        os.kill(os.getpid(), 9)
    save(path, array)
np.save = killed
case = Case("a", Path({str(case.image)!r}), (Path({str(case.labels[0])!r}),))
cache.load_volumes([case], {MR!r}, values={VALUES!r}, channels=1, folder=Path({str(case.image.parent / "cache")!r}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    assert not [name for name in cached(case) if name.endswith(".labels.npy") and not name.startswith(".")]
    assert load(case).labels.any()


def test_progress_counts_the_cases(case: Case):
    seen: list[int] = []
    folder = case.image.parent / "cache"
    load_volumes([case, case], MR, values=VALUES, channels=1, folder=folder, progress=seen.append)
    assert seen == [1, 2]
