"""`medseg-diff evaluate --generated` on folders whose nature is known: held-out crops, training crops, noise."""

import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medseg_diff import cli
from medseg_diff.checkpoint import load_model
from medseg_diff.config import Config, plain
from medseg_diff.config_file import parse_config
from medseg_diff.datasets.layouts import read_dataset
from medseg_diff.datasets.phantom import make_phantom
from medseg_diff.errors import UserError
from medseg_diff.generate import generate_files
from medseg_diff.realism import report
from medseg_diff.realism.images import draw_crops, load_split, read_generated
from medseg_diff.realism.report import evaluate_generated, table

SPACING_MM = (0.9, 1.8, 3.0)


@pytest.fixture(scope="module", autouse=True)
def _folder(tmp_path_factory):
    """The cache lies in the working folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("work"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr(report, "STEPS", 60)
        patch.setattr(report, "HELD_OUT", 300)
        make_phantom(Path("phantom"), 12, "mr", 1, 0)
        yield


def config_for(size: tuple[int, ...], axis: int = 1, modality: str = "mr") -> Config:
    data = {"root": "phantom", "folds": 2, "spacing_mm": SPACING_MM, "axis": axis, "size": size, "modality": modality}
    content = {"task": "generate", "data": data | {"spatial_dims": len(size)}, "network": {"kind": "unconditional"}}
    return parse_config(content | {"tracking": {"experiment": "realism"}}, "test")


def write(folder: Path, config: Config, images: torch.Tensor, masks: np.ndarray | None = None, **about: object) -> Path:
    """As `medseg-diff generate` does."""
    folder.mkdir()
    affine, data = np.diag([*SPACING_MM, 1.0]), config.data
    for i, image in enumerate(images):
        for suffix, array in (("", image[0].numpy()), ("_seg", None if masks is None else masks[i].astype(np.uint8))):
            if array is not None:
                array = np.expand_dims(array, data.axis) if data.spatial_dims == 2 else array
                nib.save(nib.Nifti1Image(array, affine), folder / f"image_{i:04d}{suffix}.nii.gz")
    model = {"path": "runs/x/best.safetensors", "digest": "abc"}
    about = {"model": model, "seed": 3, "steps": 8, "sampler": "dpm++", "config": plain(config), **about}
    (folder / "generation.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def summaries() -> dict[str, dict]:
    config = config_for((32, 16))
    training, held_out = load_split(read_dataset(Path("phantom")), config.data, labelled=True)
    crops = {
        "training": draw_crops(training, config.data, 60, (5,)),
        "held_out": draw_crops(held_out, config.data, 60, (6,)),
    }
    crops["noise"] = (torch.randn(60, 1, 32, 16, generator=torch.Generator().manual_seed(0)), crops["training"][1])
    found = {}
    for name, (images, labels) in crops.items():
        folder = write(Path(name), config, images, labels.numpy() if name != "noise" else None)
        found[name] = evaluate_generated(folder, Path("phantom"), Path(f"{name}_out"), seed=1, uri="sqlite:///runs.db")
    return found


def test_held_out_images_score_near_the_floor(summaries):
    mean = summaries["held_out"]["mean"]
    assert mean["frechet"] < 1.3 * mean["frechet_floor"]
    assert mean["kernel"] < mean["kernel_floor"] + 0.1
    assert mean["precision"] > mean["precision_floor"] - 0.1
    assert mean["recall"] > mean["recall_floor"] - 0.1
    assert mean["ms_ssim"] == pytest.approx(mean["ms_ssim_reference"], abs=0.05)
    assert mean["memorized"] <= 0.05
    assert mean["memorized_floor"] == pytest.approx(0.01)
    assert mean["nearest_distance"] == pytest.approx(mean["nearest_distance_reference"], rel=0.1)


def test_noise_scores_far_off(summaries):
    mean = summaries["noise"]["mean"]
    assert mean["frechet"] > 5 * mean["frechet_floor"]
    assert mean["kernel"] > 5 * abs(mean["kernel_floor"]) + 1
    assert mean["precision"] < mean["precision_floor"] - 0.5
    assert (mean["recall"], mean["memorized"]) == (0, 0)
    assert mean["ms_ssim"] < mean["ms_ssim_reference"] - 0.05
    assert not [name for name in mean if name.startswith("label/")]


def test_training_images_are_memorized(summaries):
    mean, nearest = summaries["training"]["mean"], summaries["training"]["nearest"]
    assert mean["memorized"] == 1
    assert mean["nearest_distance"] < 0.01
    config = config_for((32, 16))
    training, _ = load_split(read_dataset(Path("phantom")), config.data, labelled=True)
    image = nib.load(f"training/{nearest[0]['image']}.nii.gz").get_fdata()[:, 0]
    volume = next(volume for volume in training if volume.name == nearest[0]["case"])
    assert len(nearest) == 60
    plane = volume.image[0, :, nearest[0]["slice"]].numpy()
    row, column = nearest[0]["start"]
    height, width = min(32, plane.shape[0]), min(16, plane.shape[1])
    inside = plane[max(row, 0) : max(row, 0) + height, max(column, 0) : max(column, 0) + width]
    top, left = max(-row, 0), max(-column, 0)
    np.testing.assert_allclose(image[top : top + height, left : left + width], inside, atol=1e-5)


def test_labels_are_measured_in_square_millimetres(summaries):
    mean = summaries["training"]["mean"]
    voxels = [np.asarray(nib.load(path).dataobj) == 1 for path in sorted(Path("training").glob("*_seg.nii.gz"))]
    areas = np.array([v.sum() for v in voxels]) * 0.9 * 3.0
    assert mean["label/organ/present"] == pytest.approx((areas > 0).mean())
    assert mean["label/organ/mean_mm2"] == pytest.approx(areas[areas > 0].mean())
    assert mean["label/organ/std_mm2_reference"] > 0


def test_the_report_is_written_tracked_and_says_what_its_features_are(summaries):
    summary = summaries["held_out"]
    assert json.loads(Path("held_out_out/summary.json").read_text()) == summary
    assert summary["features"]["training_cases"] == 6
    assert summary["features"]["explained_variance"] > 0.3
    assert Path("held_out_out/nearest.png").stat().st_size > 10_000
    from medseg_diff.tracking import connect

    client = connect("sqlite:///runs.db")
    runs = client.search_runs([client.get_experiment_by_name("realism").experiment_id])
    (run,) = [run for run in runs if run.info.run_name == "evaluate held_out"]
    assert run.data.metrics["generated/frechet"] == pytest.approx(summary["mean"]["frechet"])
    assert run.data.tags["model_digest"] == "abc"
    assert (run.data.params["generate.steps"], run.data.params["data.folds"]) == ("8", "2")
    assert {item.path for item in client.list_artifacts(run.info.run_id)} >= {"summary.json", "nearest.png"}
    lines = table(summary).splitlines()
    assert lines[0].split() == ["generated", "held-out"]
    assert any(line.split()[0] == "frechet" and len(line.split()) == 3 for line in lines)


def test_the_command_evaluates_volumes(monkeypatch, capsys):
    config = config_for((16, 16, 16))
    training, _ = load_split(read_dataset(Path("phantom")), config.data, labelled=True)
    images, labels = draw_crops(training, config.data, 8, (5,))
    write(Path("volumes"), config, images, labels.numpy(), dataset={"dataset_digest": "another"})
    arguments = ["--generated", "volumes", "--reference", "phantom", "--out", "out3", "--uri", ""]
    monkeypatch.setattr(sys, "argv", ["medseg-diff", "evaluate", *arguments])
    monkeypatch.setattr(report, "HELD_OUT", 30)
    monkeypatch.setattr(report, "STEPS", 5)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    out, err = capsys.readouterr()
    assert "label/organ/mean_ml" in out
    assert "phantom is not what the model was trained on" in err
    assert json.loads(Path("out3/summary.json").read_text())["mean"]["memorized"] == 1


def test_what_generate_writes_is_read(models, monkeypatch):
    monkeypatch.setattr(report, "STEPS", 2)
    monkeypatch.setattr(report, "HELD_OUT", 10)
    model = load_model(models["unconditional_slices"], torch.device("cpu"))
    generate_files(model, Path("drawn"), 9, steps=1, seed=0)
    summary = evaluate_generated(Path("drawn"), Path("phantom"), Path("drawn_out"), seed=0, uri="")
    assert (summary["n"], summary["n_reference"]) == (9, 10)
    assert summary["mean"]["memorized"] == 0


def test_ct_comes_back_from_hounsfield_units():
    config = config_for((16, 16), modality="ct")
    images = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    write(Path("ct"), config, (images + 1) * 200 - 160)
    torch.testing.assert_close(read_generated(Path("ct"), read_dataset(Path("phantom"))).images, images)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("no description", "medseg-diff generate wrote"),
        ("broken description", "generation.json"),
        ("no configuration", "configuration"),
        ("wrong configuration", "data.size"),
        ("no images", "0 images"),
        ("few images", "7 images"),
        ("another size", "16x1x16"),
        ("unreadable", "image_0003.nii.gz"),
        ("unknown label", "label value 9"),
        ("a mask missing", "no mask"),
    ],
)
def test_what_cannot_be_judged_is_refused(fault, said, tmp_path):
    config = config_for((16, 16) if fault != "another size" else (32, 16))
    masks = np.zeros((8, 16, 16), int)
    masks[2, 3, 3] = 9 if fault == "unknown label" else 1
    folder = write(tmp_path / "set", config, torch.rand(7 if fault == "few images" else 8, 1, 16, 16), masks)
    about = folder / "generation.json"
    match fault:
        case "no description":
            about.unlink()
        case "broken description":
            about.write_text("{")
        case "no configuration":
            about.write_text("{}")
        case "wrong configuration":
            about.write_text(about.read_text().replace("[16, 16]", "[17, 16]"))
        case "no images":
            for path in folder.glob("image*"):
                path.unlink()
        case "unreadable":
            (folder / "image_0003.nii.gz").write_bytes(b"nothing")
        case "a mask missing":
            (folder / "image_0004_seg.nii.gz").unlink()
    with pytest.raises(UserError, match=said):
        evaluate_generated(folder, Path("phantom"), tmp_path / "out", seed=0, uri="")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", [["--generated", "x"], ["--reference", "x"], ["--generated", "x", "--reference", "y", "--data", "z"]]
)
def test_options_that_do_not_fit_together(options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["medseg-diff", "evaluate", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "--generated and --reference" in capsys.readouterr().err
