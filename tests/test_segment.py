import csv
import itertools
import json
import shutil
import zipfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from medseg_diff import inference, segment
from medseg_diff.checkpoint import Model, load_model
from medseg_diff.denoising import resampled
from medseg_diff.ensemble import interval90
from medseg_diff.errors import UserError
from medseg_diff.scans.read import read_scan
from medseg_diff.segment import FILES, segment_files
from medseg_diff.segmentation import needed_bytes, segment_scan

CPU = torch.device("cpu")
OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.2, -0.1, 0.3) @ np.diag([-1.2, 1.0, 1.5]), [11.0, -23.0, 5.0]
)


@pytest.fixture(scope="module")
def model(models) -> dict[str, Model]:
    return {name: load_model(models[name], CPU) for name in ("volumes", "slices", "unet")}


def write_scan(path: Path, shape: tuple[int, ...] = (20, 18, 14), scale: float = 100.0) -> Path:
    """Soft blobs on an oblique grid, with form codes of their own."""
    values = gaussian_filter(np.random.default_rng(0).normal(size=shape), 1.0) * scale
    scan = nib.Nifti1Image(values.astype(np.float32), OBLIQUE)
    scan.set_qform(OBLIQUE, 1)
    scan.set_sform(OBLIQUE, 2)
    scan.header.set_xyzt_units("mm")
    nib.save(scan, path)
    return path


@pytest.fixture(scope="module")
def scan(tmp_path_factory) -> Path:
    return write_scan(tmp_path_factory.mktemp("scans") / "knee.nii.gz")


def names(folder: Path) -> list[str]:
    """Of files that belong to one scan."""
    return sorted(path.name for path in folder.iterdir() if path.name != "report.csv") if folder.exists() else []


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


@pytest.mark.parametrize("kind", ["volumes", "slices"])
def test_every_file_lies_on_the_scans_grid(model, scan, tmp_path, kind):
    items = ["seg", "prob", "uncertainty", "samples", "preview", "report", "seg-nrrd"]
    [report], refused = segment_files([scan], model[kind], tmp_path, samples=3, items=items)
    assert refused == []
    assert names(tmp_path) == sorted(f"knee{FILES[item]}" for item in items)
    assert sorted(report["written"]) == [str(tmp_path / name) for name in names(tmp_path)]
    given = nib.load(scan)
    for item, dtype, frames in (
        ("seg", np.uint8, ()), ("uncertainty", np.float32, ()), ("prob", np.float32, (3,)), ("samples", np.uint8, (3,)),
    ):  # fmt: skip
        written = nib.load(tmp_path / f"knee_{item}.nii.gz")
        assert written.shape == (*given.shape, *frames)
        assert written.get_data_dtype() == dtype
        assert np.array_equal(written.affine, given.affine)
        for field in ("qform_code", "sform_code", "xyzt_units"):
            assert written.header[field] == given.header[field], field


@pytest.mark.parametrize("kind", ["volumes", "slices"])
def test_probabilities_mask_and_uncertainty_are_one_story(model, scan, tmp_path, kind):
    segment_files([scan], model[kind], tmp_path, samples=3, items=["seg", "prob", "uncertainty", "samples"])
    mask, prob, uncertainty, samples = (
        voxels(tmp_path / f"knee_{item}.nii.gz") for item in ("seg", "prob", "uncertainty", "samples")
    )
    assert set(np.unique(mask)) == set(np.unique(samples)) == {0, 7, 205}
    np.testing.assert_allclose(prob.sum(-1), 1, atol=1e-5)
    assert np.array_equal(np.array([0, 7, 205])[prob.argmax(-1)], mask)
    np.testing.assert_allclose(uncertainty, 1 - prob.max(-1), atol=1e-6)
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(np.moveaxis(samples, -1, 0), 2))


def test_the_report_says_what_was_done(model, scan, tmp_path):
    [report], _ = segment_files([scan], model["volumes"], tmp_path, samples=16, steps=2, seed=5)
    assert names(tmp_path) == [
        f"knee_{end}" for end in ("preview.png", "report.json", "seg.nii.gz", "uncertainty.nii.gz")
    ]
    assert json.loads((tmp_path / "knee_report.json").read_text()) == json.loads(json.dumps(report))
    assert report["scan"] == str(scan)
    assert report["model"]["digest"] == model["volumes"].digest
    assert (report["samples"], report["steps"], report["seed"], report["warnings"]) == (16, 2, 5, [])
    assert report["seconds"] > 0
    assert report["interval_nominal"] == 0.882
    mask, voxel_ml = voxels(tmp_path / "knee_seg.nii.gz"), 1.2 * 1.5 / 1000
    assert [(label["value"], label["name"]) for label in report["labels"]] == [(7, "core"), (205, "shell")]
    for label in report["labels"]:
        low, high = label["volume_ml_interval90"]
        assert label["volume_ml"] == pytest.approx((mask == label["value"]).sum() * voxel_ml, rel=1e-5)
        assert 0 < low <= label["volume_ml"] <= high
        assert 0 < label["agreement"] < 1
        assert 0 < label["expected_dice"] < 1


def test_interval_and_agreement_are_those_of_the_samples(model, tmp_path):
    """On the network's own grid the written samples are the ones that were counted."""
    values = gaussian_filter(np.random.default_rng(1).normal(size=(16, 16, 16)), 1.0)
    nib.save(nib.Nifti1Image(values.astype(np.float32), np.eye(4)), tmp_path / "plain.nii.gz")
    [report], _ = segment_files(
        [tmp_path / "plain.nii.gz"], model["volumes"], tmp_path / "out", samples=4, items=["samples", "report"]
    )
    masks = np.moveaxis(voxels(tmp_path / "out/plain_samples.nii.gz"), -1, 0)
    for label in report["labels"]:
        members = masks == label["value"]
        expected = interval90(members.sum((1, 2, 3)) / 1000, label["volume_ml"])
        assert label["volume_ml_interval90"] == pytest.approx(expected)
        dice = [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in itertools.combinations(members, 2)]
        assert label["agreement"] == pytest.approx(np.mean(dice))


@pytest.mark.parametrize("kind", ["volumes", "slices"])
def test_a_scan_gives_the_same_bytes_in_any_company(model, scan, tmp_path, kind):
    other = write_scan(tmp_path / "other.nii.gz", (9, 8, 7))
    items = ["seg", "uncertainty", "samples"]
    segment_files([scan], model[kind], tmp_path / "alone", samples=2, seed=7, items=items)
    segment_files([other, scan], model[kind], tmp_path / "together", samples=2, seed=7, items=items)
    for name in names(tmp_path / "alone"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "together" / name).read_bytes()


@pytest.mark.parametrize("kind", ["volumes", "slices"])
@pytest.mark.parametrize("shape", [(3, 3, 3), (20, 18, 1), (1, 18, 14)])
def test_tiny_and_flat_scans(model, tmp_path, kind, shape):
    path = write_scan(tmp_path / "thin.nii.gz", shape)
    _, refused = segment_files([path], model[kind], tmp_path / "out", samples=2)
    assert refused == []
    assert nib.load(tmp_path / "out/thin_seg.nii.gz").shape == shape


def test_a_scan_without_contrast_has_an_empty_mask_and_a_warning(model, tmp_path):
    path = write_scan(tmp_path / "zero.nii.gz", scale=0.0)
    items = ["seg", "samples", "report", "uncertainty"]
    [report], _ = segment_files([path], model["volumes"], tmp_path / "out", samples=2, items=items)
    assert "same value" in report["warnings"][0]
    assert not voxels(tmp_path / "out/zero_seg.nii.gz").any()
    assert not voxels(tmp_path / "out/zero_samples.nii.gz").any()
    assert [label["volume_ml_interval90"] for label in report["labels"]] == [(0, 0), (0, 0)]
    assert [label["expected_dice"] for label in report["labels"]] == [None, None]


def test_the_bar_advances_by_one_a_scan_and_within_it(model, scan, tmp_path, monkeypatch):
    """Also where a scan is refused, or has no contrast and is not computed."""
    parts: list[float] = []
    monkeypatch.setattr(segment, "progress", lambda what, total: nullcontext(parts.append))
    flat = write_scan(tmp_path / "flat.nii.gz", scale=0.0)
    segment_files([scan, tmp_path / "absent.nii.gz", flat], model["slices"], tmp_path, samples=1, items=["seg"])
    monkeypatch.setattr(inference, "VOXELS_AT_ONCE", 2000)
    before = len(parts)
    assert sum(parts) == pytest.approx(3)
    segment_files([scan], model["slices"], tmp_path, samples=1, items=["seg"])
    assert len(parts[before:]) > 3
    assert sum(parts[before:]) == pytest.approx(1)


def test_a_refused_scan_leaves_nothing_and_does_not_stop_the_others(model, scan, tmp_path, capsys):
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(scan.read_bytes()[:500])
    reports, [error] = segment_files([broken, scan], model["volumes"], tmp_path / "out", samples=2, items=["seg"])
    assert error.where == str(broken)
    assert str(broken) in capsys.readouterr().err
    assert [report["scan"] for report in reports] == [str(scan)]
    assert names(tmp_path / "out") == ["knee_seg.nii.gz"]


@pytest.mark.parametrize(
    ("failure", "what"),
    [
        (OSError(28, "No space left on device"), "No space left"),
        (MemoryError(), "memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), "memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), "memory"),
    ],
)
def test_what_the_machine_cannot_hold_is_refused_whole(model, scan, tmp_path, monkeypatch, failure, what):
    """It fails at the second item, and leaves what an earlier call wrote."""
    segment_files([scan], model["unet"], tmp_path, seed=1, items=["seg"])
    before = (tmp_path / "knee_seg.nii.gz").read_bytes()

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(segment, "draw_preview", fail)
    reports, [error] = segment_files([scan], model["unet"], tmp_path, seed=2, items=["seg", "preview"])
    assert reports == []
    assert what in error.what
    assert error.where == str(scan)
    assert names(tmp_path) == ["knee_seg.nii.gz"]
    assert (tmp_path / "knee_seg.nii.gz").read_bytes() == before


def test_a_bug_is_not_the_scans_fault(model, scan, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(segment, "draw_preview", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        segment_files([scan], model["volumes"], tmp_path, samples=2, items=["preview"])
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("items", "word"), [(["seg", "mesh"], "mesh"), ([], "names no item"), (["dicom_seg"], "dicom-seg")]
)
def test_unknown_items_are_refused_before_anything_is_read(model, tmp_path, items, word):
    with pytest.raises(UserError, match=word):
        segment_files([tmp_path / "absent.nii.gz"], model["volumes"], tmp_path / "out", items=items)
    assert not (tmp_path / "out").exists()


def test_items_of_dicom_need_a_series(model, scan, tmp_path, monkeypatch):
    monkeypatch.setattr(segment, "segment_scan", lambda *_, **__: pytest.fail("it was computed first"))
    for item in ("dicom-seg", "rtstruct"):
        _, [error] = segment_files([scan], model["volumes"], tmp_path / "out", items=["seg", item])
        assert item in str(error)
    assert names(tmp_path / "out") == []


def test_a_deterministic_model_has_no_intervals(model, scan, tmp_path):
    [report], _ = segment_files([scan], model["unet"], tmp_path, samples=4)
    assert report["samples"] == 0
    assert report["interval_nominal"] is None
    assert {(label["volume_ml_interval90"], label["agreement"]) for label in report["labels"]} == {(None, None)}
    with pytest.raises(UserError, match="deterministic"):
        segment_files([scan], model["unet"], tmp_path, items=["samples"])


@pytest.mark.parametrize(("values", "dtype"), [((0, 7, 205), np.uint8), ((0, 1, 1000), np.int16)])
def test_label_values_fit_their_type(model, scan, values, dtype):
    about = replace(model["unet"].about, labels=dict(zip(values, "bcs", strict=True)))
    found = segment_scan(replace(model["unet"], about=about), read_scan(scan), samples=0, steps=1, seed=0)
    assert found.label_map.dtype == dtype
    assert set(np.unique(found.label_map)) == set(values)


def test_a_dicom_series_gets_its_own_formats(model, dicom, tmp_path):
    import pydicom

    series = min((folder for folder in dicom.iterdir() if folder.is_dir()), key=lambda p: len(list(p.iterdir())))
    segment_files([series], model["unet"], tmp_path, items=["dicom-seg", "rtstruct", "report"])
    name = series.name
    assert names(tmp_path) == sorted(f"{name}{end}" for end in ("_report.json", "_rtstruct.dcm", "_seg.dcm"))
    assert pydicom.dcmread(tmp_path / f"{name}_seg.dcm").Modality == "SEG"
    assert pydicom.dcmread(tmp_path / f"{name}_rtstruct.dcm").Modality == "RTSTRUCT"


def test_an_empty_mask_has_no_dicom_files_and_a_warning(model, dicom, tmp_path):
    """Nothing found is a result, and no reason to refuse the scan; the two formats just cannot hold it."""
    about = replace(model["unet"].about, labels={0: "background"})
    network = model["unet"].network

    class Blank(torch.nn.Module):
        def encode(self, image: torch.Tensor) -> object:
            features = network.encode(image)
            return replace(features, mean_logits=features.mean_logits[:, :1])

    series = sorted(folder for folder in dicom.iterdir() if folder.is_dir())[0]
    blank = replace(model["unet"], network=Blank(), about=about)
    [report], refused = segment_files([series], blank, tmp_path, items=["rtstruct", "dicom-seg", "report"])
    assert refused == []
    assert names(tmp_path) == [f"{series.name}_report.json"]
    assert "nothing was segmented" in report["warnings"][-1]


def test_many_scans_are_one_table_and_what_is_done_stays(model, scan, tmp_path, monkeypatch):
    """Of a folder, an archive and a damaged file; the second call computes only what the first could not."""
    given, out = tmp_path / "given", tmp_path / "out"
    (given / "p1").mkdir(parents=True)
    shutil.copy(scan, given / "p1/knee.nii.gz")
    with zipfile.ZipFile(given / "clinic.zip", "w") as archive:
        archive.write(scan, "p2/knee.nii.gz")
        archive.writestr("broken.nii.gz", b"x")
    reports, [error] = segment_files([given], model["volumes"], out, samples=2, items=["seg", "report"])
    wanted = [given / "clinic.zip/p2/knee.nii.gz", given / "p1/knee.nii.gz"]
    assert [report["scan"] for report in reports] == list(map(str, wanted))
    assert error.where == str(given / "clinic.zip/broken.nii.gz")
    assert names(out / "p1") == names(out / "clinic/p2") == ["knee_report.json", "knee_seg.nii.gz"]
    assert (out / "p1/knee_seg.nii.gz").read_bytes() == (out / "clinic/p2/knee_seg.nii.gz").read_bytes()

    with (out / "report.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["scan"], line["name"]) for line in lines] == [
        *((str(path), name) for path in wanted for name in ("core", "shell")),
        (error.where, ""),
    ]
    first, label = lines[0], reports[0]["labels"][0]
    assert [float(first[f"volume_ml{end}"]) for end in ("", "_low90", "_high90")] == pytest.approx(
        [label["volume_ml"], *label["volume_ml_interval90"]]
    )
    assert lines[-1]["error"] == f"{error.what}. {error.advice}"

    (out / "p1/knee_seg.nii.gz").unlink()
    computed: list[Path] = []
    monkeypatch.setattr(
        segment, "read_scan", lambda path, *more: computed.append(path.relative_to(given)) or read_scan(path, *more)
    )
    changes = ({}, {}, {"seed": 1}, {"items": ["seg", "prob", "report"]})
    for change, count in zip(changes, (1, 0, 1, 1), strict=True):
        computed.clear()
        settings = {"samples": 2, "items": ["seg", "report"], "skip_existing": True} | change
        again, refused = segment_files([given / "p1"], model["volumes"], out / "p1", **settings)
        assert (len(again), refused, len(computed)) == (1, [], count), change
    with pytest.raises(UserError, match="report"):
        segment_files([given], model["volumes"], out, items=["seg"], skip_existing=True)


def test_memory_is_told_and_refused_before_the_start(model, scan, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(segment, "TOLD_BYTES", 0)
    needed = needed_bytes(model["volumes"], read_scan(scan), 2)
    for free, refusals in ((needed, 0), (needed - 1, 1)):
        monkeypatch.setattr(segment, "free_memory_bytes", lambda free=free: float(free))
        _, refused = segment_files([scan], model["volumes"], tmp_path / f"{free}", samples=2, items=["seg"])
        assert len(refused) == refusals
        assert "it needs up to 1.0 GB of memory, and 1.0 GB are free" in capsys.readouterr().err
    assert names(tmp_path / f"{needed - 1}") == []


def test_memory_that_samples_take_is_saved_by_fewer(models, scan, tmp_path, monkeypatch):
    """STAPLE judges all samples at once."""
    model = resampled(load_model(models["v2"], CPU), fuse="staple")
    free = needed_bytes(model, read_scan(scan), 1000) - 1
    monkeypatch.setattr(segment, "free_memory_bytes", lambda: float(free))
    _, [error] = segment_files([scan], model, tmp_path, samples=1000, items=["seg"])
    assert "--samples" in error.advice
