import nibabel as nib
import numpy as np
import pytest
import torch

from medseg_diff.checkpoint import Model, load_model
from medseg_diff.generate import TOGETHER, generate_files, generate_images


@pytest.fixture(scope="module")
def model(models) -> dict[str, Model]:
    return {name: load_model(models[name], torch.device("cpu")) for name in ("unconditional", "unconditional_slices")}


@pytest.mark.parametrize("kind", ["unconditional", "unconditional_slices"])
def test_an_image_depends_on_the_seed_and_its_number_only(model, kind):
    three = generate_images(model[kind], 3, steps=2, seed=1)
    assert torch.equal(three, generate_images(model[kind], 3, steps=2, seed=1))
    torch.testing.assert_close(three[:2], generate_images(model[kind], 2, steps=2, seed=1), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(three[0], three[1], atol=0.1)
    assert not torch.allclose(three, generate_images(model[kind], 3, steps=2, seed=2), atol=0.1)


def test_images_beyond_one_call(model):
    many = generate_images(model["unconditional_slices"], TOGETHER + 2, steps=1, seed=0)
    assert len(many) == TOGETHER + 2
    assert len(torch.unique(many.flatten(1), dim=0)) == TOGETHER + 2


@pytest.mark.parametrize(("kind", "shape"), [("unconditional", (16, 16, 16)), ("unconditional_slices", (16, 16, 1))])
def test_files_are_reproducible_and_lie_on_a_grid(model, tmp_path, kind, shape):
    for folder in ("a", "b"):
        paths = generate_files(model[kind], tmp_path / folder, 3, steps=2, seed=3)
        assert [path.name for path in paths] == ["grid.png", *(f"image_000{i}.nii.gz" for i in range(3))]
    for path in paths:
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()
    images = generate_images(model[kind], 3, steps=2, seed=3)
    for path, image in zip(paths[1:], images, strict=True):
        written = nib.load(path)
        assert written.shape == shape
        assert np.array_equal(written.affine, np.eye(4))
        np.testing.assert_array_equal(np.asarray(written.dataobj).squeeze(), image[0].numpy())
