"""The program as its users call it: exit codes, stdout for results, stderr for talk, errors that say what to do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medseg_diff import cli

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("demo", "train", "segment", "evaluate", "generate", "diffusion", "compare", "check", "info", "phantom")


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the program in an empty folder; gives exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEDSEG_DIFF_MODEL", raising=False)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["medseg-diff", *map(str, arguments)])
        code: object = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code
        out, err = capsys.readouterr()
        return int(code or 0), out, err

    return run


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    path = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(np.random.default_rng(0).normal(size=(8, 9, 10)).astype(np.float32), np.eye(4)), path)
    return path


def test_help_names_every_command_without_torch():
    code = "import sys; from medseg_diff import cli; sys.argv[1:] = ['--help']\n"
    code += "try: cli.main()\nfinally: print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    for heavy in ("torch", "monai", "mlflow", "matplotlib", "SimpleITK", "numpy"):
        assert f"'{heavy}'" not in done.stdout, heavy


def test_the_module_is_the_program():
    done = subprocess.run(
        [sys.executable, "-m", "medseg_diff", "--version"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == cli.__version__


def test_no_model_says_what_to_do(call, scan):
    code, out, err = call("segment", scan)
    assert (code, out) == (2, "")
    assert "--model" in err
    assert "medseg-diff train" in err
    assert "Traceback" not in err


def test_the_summary_lists_what_was_refused(call, scan, models, tmp_path):
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(scan.read_bytes()[:100])
    code, out, err = call("segment", scan, broken, "--model", models["volumes"], "--save", "seg")
    assert code == 1
    assert "1 of 2 scans" in out
    assert f"refused: {broken}" in out
    assert f"refused: {broken}" in err
    assert sorted(path.name for path in Path("segmentations").iterdir()) == ["scan_seg.nii.gz"]


def test_debug_shows_the_traceback_of_an_error(call, scan):
    code, _, err = call("segment", scan, "--debug")
    assert code == 2
    assert "Traceback" in err


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.stepps=5", "did you mean"),
        ("train.lr=nan", "train.lr"),
        ("train.steps=-1", "train.steps"),
        ("nonsense", "KEY=VALUE"),
        ("data.size=[30, 48, 32]", "multiple of 16"),
    ],
)
def test_configuration_errors_name_the_key(setting, said, call):
    code, _, err = call("train", "--config", ROOT / "configs/hippocampus.yaml", "--set", setting)
    assert code == 2
    assert said in err
    assert "Traceback" not in err


def test_a_data_set_that_is_not_there_is_named(call):
    code, _, err = call("train", "--config", ROOT / "configs/quickstart.yaml")
    assert code == 2
    assert "data/phantom" in err
    assert not Path("runs/quickstart/state.pt").exists()


@pytest.mark.parametrize("name", ["../escape", "", ".hidden", "a/b", "line\nbreak"])
def test_a_run_name_cannot_leave_the_folder_of_runs(name, call):
    code, _, err = call("train", "--config", ROOT / "configs/quickstart.yaml", "--name", name)
    assert code == 2
    assert "plain name" in err


def test_phantom_and_check_agree_that_all_is_well(call):
    assert call("phantom", "set", "--cases", 2)[0] == 0
    code, out, _ = call("check", "set", "--write-config", "set.yaml")
    assert code == 0
    assert "0 errors" in out
    assert "medseg-diff train --config set.yaml" in out
    assert "spatial_dims: 3" in Path("set.yaml").read_text()


def test_check_names_every_problem_and_fails(call):
    call("phantom", "set", "--cases", 2)
    for path in Path("set/labelsTr").iterdir():
        path.write_bytes(path.read_bytes()[:40])
    code, out, err = call("check", "set", "--write-config", "set.yaml")
    assert code == 2
    assert out.count("error: ") >= 2
    assert "set.yaml: it is not written" in err


def test_evaluate_needs_two_sides(call):
    code, _, err = call("evaluate", "--predictions", "somewhere")
    assert code == 2
    assert "--references" in err
    assert call("evaluate")[0] == 2


def test_evaluation_of_folders_is_printed_written_and_tracked(call):
    empty = np.zeros((8, 8, 8), np.uint8)
    box = empty.copy()
    box[2:6, 2:6, 2:6] = 1
    for folder, masks in (("references", (box, box)), ("predictions", (box, empty))):
        Path(folder).mkdir()
        for index, mask in enumerate(masks):
            nib.save(nib.Nifti1Image(mask, np.eye(4)), f"{folder}/case{index}.nii.gz")
    code, out, _ = call("evaluate", "--predictions", "predictions", "--references", "references", "--out", "scores")
    assert code == 0
    assert "2 of 2" in out
    assert json.loads(Path("scores/summary.json").read_text())["mean"]["dice"] == 0.5
    code, out, _ = call("compare", "--json")
    assert code == 0
    assert json.loads(out)[0]["metrics"]["val/dice"] == 0.5
    assert call("compare")[1].count("mlflow ui") == 1


def test_compare_without_a_store_says_so(call):
    code, _, err = call("compare")
    assert code == 2
    assert "mlflow.db" in err
    assert not Path("mlflow.db").exists()


def test_an_unknown_device_is_refused(call, tmp_path):
    code, _, err = call("train", "--config", ROOT / "configs/quickstart.yaml", "--device", "quantum")
    assert code == 2
    assert "quantum" in err


def test_an_unexpected_error_is_one_line_unless_debugged(call, monkeypatch):
    import medseg_diff.datasets.phantom as phantom

    def broken(*_):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(phantom, "make_phantom", broken)
    code, _, err = call("phantom", "set")
    assert code == 2
    assert "ZeroDivisionError: by zero" in err
    assert "Traceback" not in err
    assert "Traceback" in call("phantom", "set", "--debug")[2]


def test_importing_the_package_asks_mlflow_for_no_telemetry():
    code = "import os, medseg_diff; print(os.environ['MLFLOW_DISABLE_TELEMETRY'])"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "true"


@pytest.mark.parametrize(
    ("kind", "options", "sampler"),
    [
        ("volumes", [], "ddpm"),
        ("volumes", ["--sampler", "ddim"], "ddim"),
        ("v1", ["--sampler", "heun", "--fuse", "staple", "--steps", "3"], "heun"),
        ("classic", ["--fuse", "vote", "--steps", "2"], "dpm++"),
        ("unet", [], None),
    ],
)
def test_sampling_is_as_asked_for(kind, options, sampler, call, scan, models):
    code, _, err = call("segment", scan, "--model", models[kind], "--out", "o", "--save", "seg,report", *options)
    assert code == 0, err
    assert json.loads(Path("o/scan_report.json").read_text())["sampler"] == sampler


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("unet", ["--sampler", "ddim"], "deterministic"),
        ("volumes", ["--sampler", "heun"], "conditional draws; choose ddpm or ddim"),
    ],
)
def test_samplers_that_do_not_suit_a_model_are_refused(kind, options, said, call, scan, models):
    code, out, err = call("segment", scan, "--model", models[kind], "--out", "o", *options)
    assert (code, out) == (2, "")
    assert said in err
    assert not Path("o").exists()


def test_generation_shows_its_process(call, models):
    options = ["--count", 2, "--steps", 3, "--sampler", "ddpm", "--out", "g", "--show-process"]
    assert call("generate", "--model", models["pairs"], *options)[0] == 0
    assert {path.name for path in Path("g").iterdir()} >= {"process.png", "process.gif", "grid.png", "dataset.json"}
    assert json.loads(Path("g/generation.json").read_text())["sampler"] == "ddpm"
