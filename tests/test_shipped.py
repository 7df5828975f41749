"""The model that comes with the package, the sample it can be tried on, and that both reach those who install it."""

import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import untrained

from medseg_diff import cli
from medseg_diff.checkpoint import ENVIRONMENT, describe, find_model, load_model, save_model, shipped
from medseg_diff.datasets.check import check
from medseg_diff.datasets.layouts import file_digest, read_dataset, split
from medseg_diff.device import choose_device
from medseg_diff.errors import UserError
from medseg_diff.segment import segment_files

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "data/sample"


@pytest.fixture
def hippocampus_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shipped model, with an empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    if "hippocampus" not in shipped():
        pytest.skip("medseg_diff/models/hippocampus.safetensors is absent")
    return shipped()["hippocampus"]


def test_a_shipped_model_goes_by_its_name(hippocampus_model: Path, monkeypatch: pytest.MonkeyPatch):
    assert find_model("hippocampus", "segment") == (
        hippocampus_model,
        "--model hippocampus, shipped with medseg-diff",
    )
    monkeypatch.setenv(ENVIRONMENT, "hippocampus")
    assert find_model(None, "segment") == (
        hippocampus_model,
        f"${ENVIRONMENT}=hippocampus, shipped with medseg-diff",
    )
    Path("hippocampus").mkdir()
    with pytest.raises(UserError, match="hippocampus: there is no such model"):
        find_model("hippocampus", "segment")
    Path("hippocampus/best.safetensors").touch()
    assert find_model("hippocampus", "segment")[0] == Path("hippocampus/best.safetensors"), "a folder goes first"


def test_errors_name_the_shipped_model_where_it_would_help(hippocampus_model: Path):
    named = r"or --model hippocampus, which is shipped \(MRI: Anterior, Posterior\)\.$"
    for given in (None, "nowhere"):
        with pytest.raises(UserError, match=named):
            find_model(given, "segment")
    with pytest.raises(UserError) as caught:
        find_model(None, "generate")
    assert "shipped" not in str(caught.value)


def test_generate_refuses_it(
    hippocampus_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["medseg-diff", "generate", "--model", "hippocampus"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "is a model of task segment, not generate" in capsys.readouterr().err


def test_the_shipped_model_says_what_it_is_for_and_nothing_of_where_it_was_made(hippocampus_model: Path):
    assert hippocampus_model.stat().st_size < 10_000_000
    about, _ = describe(hippocampus_model)
    assert "not for diagnosis" in about.config.use
    assert about.labels == {0: "background", 1: "Anterior", 2: "Posterior"}
    assert (about.config.data.folds, about.config.data.fold) == (5, 0), "the sample is not what it learned from"
    content = hippocampus_model.read_bytes()
    header = content[8 : 8 + int.from_bytes(content[:8], "little")].decode()
    assert not any(
        folder in header for folder in ("/home", "/root", "/work", "/tmp", "/mnt", "/data", str(Path.home()))
    )


def test_what_a_model_is_for_is_said_with_its_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    path = untrained(tmp_path / "tiny.safetensors", "unet")
    model = load_model(path, choose_device("cpu"))
    config = model.about.config.model_copy(update={"use": "for bricks alone"})
    save_model(path, model.network.state_dict(), replace(model.about, config=config))
    scan = read_dataset(SAMPLE).cases[0].image
    argv = ["medseg-diff", "segment", str(scan), "--model", str(path), "--save", "report", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert capsys.readouterr().err.count("warning: the model is for bricks alone") == 1
    report = json.loads(next(Path("segmentations").glob("*.json")).read_text())
    assert report["warnings"] == ["the model is for bricks alone"]
    unsaid, _ = segment_files([scan], model, tmp_path / "o", items=["report"])
    assert unsaid[0]["warnings"] == []


def test_the_sample_is_three_sound_cases_with_their_licence():
    problems, _ = check(SAMPLE)
    assert problems == []
    sample = read_dataset(SAMPLE)
    files = [path for case in sample.cases for path in (case.image, *case.labels)]
    assert len(sample.cases) == 3
    assert sum(path.stat().st_size for path in files) < 200_000
    told = (ROOT / "data/README.md").read_text()
    assert "CC BY-SA 4.0" in told
    assert "Vanderbilt" in told
    assert all(case.name in (SAMPLE / "LICENSE").read_text() for case in sample.cases)


def test_the_sample_is_of_the_validation_cases_unchanged(hippocampus: Path):
    held_out = {case.name: case for case in split(read_dataset(hippocampus), 5, 0)[1]}
    for case in read_dataset(SAMPLE).cases:
        assert file_digest(case.image) == file_digest(held_out[case.name].image)
        assert file_digest(case.labels[0]) == file_digest(held_out[case.name].labels[0])


def test_git_takes_the_sample_and_no_other_data():
    def ignored(path: str) -> bool:
        return not subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT, check=False).returncode

    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    assert ignored("data/knees/dataset.json")
    assert not any(ignored(str(path.relative_to(ROOT))) for path in SAMPLE.rglob("*"))
    assert not ignored("medseg_diff/models/hippocampus.safetensors")


def test_models_travel_in_the_wheel(tmp_path: Path):
    pytest.importorskip("setuptools")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "medseg_diff", tmp_path / "medseg_diff", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "medseg_diff/models/another.safetensors").touch()
    build = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        held = wheel.namelist()
    models = {f"medseg_diff/models/{path.name}" for path in (ROOT / "medseg_diff/models").iterdir()}
    assert {*models, "medseg_diff/models/another.safetensors"} <= set(held)
