from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from matplotlib.image import imread

from medseg_diff.checkpoint import load_model
from medseg_diff.datasets.cache import Volume, load_volumes
from medseg_diff.datasets.layouts import Case
from medseg_diff.datasets.pipeline import preprocessing
from medseg_diff.training import validation
from medseg_diff.training.validation import STRIP_STEPS, draw_process, validate

CPU = torch.device("cpu")
SHAPE = (20, 18, 40)


def volume() -> Volume:
    """Foreground in the slices around z = 30."""
    image = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(1, *SHAPE, dtype=torch.uint8)
    labels[0, 5:10, 5:10, 29:32] = 1
    labels[0, 4:12, 4:12, 30] = 2
    return Volume("a", image, labels, ())


def case(folder: Path) -> Case:
    held = volume()
    paths = folder / "image.nii.gz", folder / "label.nii.gz"
    values = held.image[0].numpy(), np.array([0, 7, 205], np.uint8)[held.labels[0].numpy()]
    for path, array in zip(paths, values, strict=True):
        nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    return Case("a", paths[0], (paths[1],))


@pytest.mark.parametrize(
    ("kind", "pictures"),
    [
        ("volumes", ["preview.png", "process.png"]),
        ("slices", ["preview.png", "process.png"]),
        ("unet", ["preview.png"]),
    ],
)
def test_a_model_file_is_judged_and_pictured(models, tmp_path, kind, pictures):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run/model.safetensors"
    path.write_bytes(models[kind].read_bytes())
    about, judged = load_model(path, CPU).about, case(tmp_path)
    held = load_volumes(
        [judged], preprocessing(about.config.data), values=list(about.labels), channels=1, folder=tmp_path / "cache"
    )
    metrics, calibration = validate(path, CPU, [judged], held, seed=0)
    assert {"val/dice", "val/dice/core", "val/dice/shell", "val/n"} <= metrics.keys()
    assert ("val/coverage90/core" in metrics) == (kind != "unet")
    assert calibration.cases == 1
    # Several windows: they are tempered before they are fused, and the fit saw them fused.
    assert metrics["val/nll"] == pytest.approx(calibration.nll_after, rel=1e-2), "it is judged at its temperature"
    assert calibration.nll_after < calibration.nll_before
    assert calibration.samples == (0 if kind == "unet" else 4)
    assert sorted(p.name for p in path.parent.iterdir()) == sorted(["model.safetensors", *pictures])


def test_a_generator_leaves_a_grid(models, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(models["unconditional"].read_bytes())
    assert validate(path, CPU, [], [], seed=0) == ({}, None)
    assert imread(tmp_path / "grid.png").ndim == 3


@pytest.mark.parametrize("kind", ["volumes", "slices"])
def test_the_process_is_shown_where_the_foreground_is(models, tmp_path, monkeypatch, kind):
    """Every panel is of the slice with most foreground, and the network never sees more than in training."""
    model, held = load_model(models[kind], CPU), volume()
    axis = model.about.config.data.axis
    seen = []
    monkeypatch.setattr(validation, "draw_strip", lambda rows, aspect, path: seen.append((rows, aspect)))
    traced = []
    trace = validation.trace

    def watched(model, image, **options):
        traced.append(image.shape[1:])
        return trace(model, image, **options)

    monkeypatch.setattr(validation, "trace", watched)
    draw_process(model, held, tmp_path / "process.png", seed=0)
    [((above, below), aspect)] = seen
    assert aspect == 1
    assert len(above) == len(below) == 1 + STRIP_STEPS
    most = {1: 5, 2: 30}[axis]
    foreground = held.labels[0].select(axis, most).rot90().numpy() > 0
    values = held.image[0].select(axis, most).rot90().numpy()
    scan, reference = above[0][1], below[0][1].any(-1)
    assert np.array_equal(scan[reference], values[foreground])
    assert np.isin(scan, values).all()
    assert {panel.shape[:2] for row in (above, below) for _, panel in row} == {(16, 16)}
    data = model.about.config.data
    assert traced[0][axis] == (16 if kind == "volumes" else 2 * data.neighbours + 1)


@pytest.mark.parametrize("kind", ["volumes", "slices"])
def test_the_process_of_a_volume_without_foreground_or_smaller_than_a_crop(models, tmp_path, kind):
    held = volume()
    empty = replace(held, image=held.image[:, :9, :9, :9], labels=torch.zeros(1, 9, 9, 9, dtype=torch.uint8))
    draw_process(load_model(models[kind], CPU), empty, tmp_path / "process.png", seed=0)
    assert imread(tmp_path / "process.png").ndim == 3
