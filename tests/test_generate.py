import copy
import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import untrained
from matplotlib.image import imread
from PIL import Image

from medseg_diff.checkpoint import Model, load_model
from medseg_diff.datasets.layouts import read_dataset
from medseg_diff.denoising import resampled
from medseg_diff.errors import UserError
from medseg_diff.generate import TOGETHER, generate_files, generate_images


@pytest.fixture(scope="module")
def model(models) -> dict[str, Model]:
    names = ("unconditional", "unconditional_slices", "pairs")
    return {name: load_model(models[name], torch.device("cpu")) for name in names}


@pytest.mark.parametrize("kind", ["unconditional", "unconditional_slices"])
@pytest.mark.parametrize("sampler", [None, "ddpm"])
def test_an_image_depends_on_the_seed_and_its_number_only(model, kind, sampler):
    chosen = resampled(model[kind], sampler=sampler)
    three = generate_images(chosen, 3, steps=2, seed=1)
    assert torch.equal(three, generate_images(chosen, 3, steps=2, seed=1))
    torch.testing.assert_close(three[:2], generate_images(chosen, 2, steps=2, seed=1), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(three[0], three[1], atol=0.1)
    assert not torch.allclose(three, generate_images(chosen, 3, steps=2, seed=2), atol=0.1)


def test_a_sampler_is_followed(model):
    drawn = [
        generate_images(resampled(model["unconditional_slices"], sampler=sampler), 2, steps=4, seed=0)
        for sampler in (None, "dpm++", "ddim", "heun", "ddpm", "dpm++sde")
    ]
    assert torch.equal(drawn[0], drawn[1]), "dpm++ is what auto means here"
    for index, images in enumerate(drawn[1:], start=1):
        assert images.isfinite().all()
        assert not any(torch.allclose(images, other, atol=1e-3) for other in drawn[index + 1 :])


def test_images_beyond_one_call(model):
    many = generate_images(model["unconditional_slices"], TOGETHER + 2, steps=1, seed=0)
    assert len(many) == TOGETHER + 2
    assert len(torch.unique(many.flatten(1), dim=0)) == TOGETHER + 2


@pytest.mark.parametrize(("kind", "shape"), [("unconditional", (16, 16, 16)), ("unconditional_slices", (16, 16, 1))])
def test_files_are_reproducible_and_lie_on_a_grid(model, tmp_path, kind, shape):
    for folder in ("a", "b"):
        paths = generate_files(model[kind], tmp_path / folder, 3, steps=2, seed=3)
        assert [path.name for path in paths[:2]] == ["grid.png", "generation.json"]
        assert [path.name for path in paths[2:]] == [f"image_000{i}.nii.gz" for i in range(3)]
    for path in paths:
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()
    images = generate_images(model[kind], 3, steps=2, seed=3)
    for path, image in zip(paths[2:], images, strict=True):
        written = nib.load(path)
        assert written.shape == shape
        assert np.array_equal(written.affine, np.eye(4))
        np.testing.assert_array_equal(np.asarray(written.dataobj).squeeze(), image[0].numpy())
    account = json.loads((tmp_path / "a/generation.json").read_text())
    assert (account["count"], account["seed"], account["steps"], account["sampler"]) == (3, 3, 2, "dpm++")
    assert account["model"]["digest"] == model[kind].digest


def test_pairs_are_a_data_set_in_the_decathlon_layout(model, tmp_path):
    generate_files(model["pairs"], tmp_path, 5, steps=2, seed=0)
    generate_files(model["pairs"], tmp_path, 5, steps=2, seed=0)
    dataset = read_dataset(tmp_path)
    assert dataset.labels == {0: "background", 7: "core", 205: "shell"}
    assert [case.name for case in dataset.cases] == [f"image_000{i}" for i in range(5)]
    drawn = generate_images(model["pairs"], 5, steps=2, seed=0)
    assert drawn.shape == (5, 4, 16, 16)
    found = set()
    for case, pair in zip(dataset.cases, drawn, strict=True):
        image, labels = (np.asarray(nib.load(path).dataobj) for path in (case.image, case.labels[0]))
        np.testing.assert_array_equal(image.squeeze(), pair[0].numpy())
        np.testing.assert_array_equal(labels.squeeze(), np.array([0, 7, 205])[pair[1:].argmax(0).numpy()])
        assert labels.dtype == np.uint8
        assert case.labels[0].read_bytes() == (tmp_path / f"{case.name}_seg.nii.gz").read_bytes()
        found |= set(np.unique(labels).tolist())
    assert found == {0, 7, 205}
    assert (imread(tmp_path / "grid.png")[..., :3].std(-1) > 0.05).any(), "masks tint the grid"


def test_another_model_into_the_same_folder_leaves_nothing_of_the_first(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "image_0009.nii.gz").write_bytes(b"mine too: nothing here says that generate wrote it")
    generate_files(model["pairs"], tmp_path, 5, steps=1, seed=0, show_process=True)
    assert (tmp_path / "image_0009.nii.gz").exists()
    generate_files(model["unconditional_slices"], tmp_path, 2, steps=1, seed=0)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"notes.txt", "grid.png", "generation.json", "image_0000.nii.gz", "image_0001.nii.gz"}


def test_images_that_are_not_finite_are_an_error(model, tmp_path):
    broken = model["unconditional_slices"]
    network = copy.deepcopy(broken.network)
    with torch.no_grad():
        network.head.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        generate_files(replace(broken, network=network), tmp_path, 2, steps=1, seed=0)


def test_ct_is_written_in_hounsfield_units(tmp_path):
    path = untrained(
        tmp_path / "ct.safetensors", "unconditional", dims=2, data_modality="ct", data_window_hu=[-160.0, 240.0]
    )
    model = load_model(path, torch.device("cpu"))
    generate_files(model, tmp_path / "out", 1, steps=2, seed=0)
    normalized = generate_images(model, 1, steps=2, seed=0)[0, 0].numpy()
    written = np.asarray(nib.load(tmp_path / "out/image_0000.nii.gz").dataobj).squeeze()
    np.testing.assert_allclose(written, 40 + 200 * normalized, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["unconditional", "pairs"])
def test_the_process_is_shown(model, tmp_path, kind):
    paths = generate_files(model[kind], tmp_path, 3, steps=5, seed=0, show_process=True)
    assert {path.name for path in paths} >= {"process.png", "process.gif"}
    assert imread(tmp_path / "process.png").ndim == 3
    with Image.open(tmp_path / "process.gif") as film:
        assert film.n_frames == 6
