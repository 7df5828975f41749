"""The demonstration, with seconds of training in the place of minutes: every room of the house is walked through."""

import json
import re
from pathlib import Path

import pytest

from medseg_diff import demo
from medseg_diff.checkpoint import shipped
from medseg_diff.device import choose_device


def test_the_demo_begins_with_a_real_scan(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    if "hippocampus" not in shipped():
        pytest.skip("medseg_diff/models/hippocampus.safetensors is absent")
    text = "\n".join(demo._real_scan(tmp_path, choose_device("cpu")))
    said = re.findall(r"(\w+): (\S+) ml, plausibly (\S+) to (\S+); reference (\S+) ml, Dice (\S+)", text)
    assert [words[0] for words in said] == ["Anterior", "Posterior"]
    for _, *numbers in said:
        volume, low, high, reference, dice = map(float, numbers)
        assert low <= volume <= high
        assert 1.3 < reference < 1.7
        assert dice > 0.7
    assert Path(re.findall(r"\S+\.png", text)[0]).is_file()
    assert text.strip() in capsys.readouterr().err, "it does not wait for the training to end"


def test_without_the_sample_the_demo_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(demo, "SAMPLE", tmp_path / "absent")
    assert demo._real_scan(tmp_path, choose_device("cpu")) == []
    assert "no real scan is segmented" in capsys.readouterr().err


@pytest.mark.timeout(900)  # five minutes on an idle machine
@pytest.mark.slow
def test_the_demo_ends_by_naming_what_it_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "SEGMENT_MINUTES", 0.02)
    monkeypatch.setattr(demo, "GENERATE_MINUTES", 0.02)
    out = tmp_path / "demo"
    text = demo.run_demo(out)
    named = [Path(path) for path in re.findall(r"\S+\.(?:png|nii\.gz|json|safetensors)", text)]
    assert len(named) >= 7
    assert all(path.is_file() for path in named)
    assert f"sqlite:///{out / 'mlflow.db'}" in text
    assert (out / "mlflow.db").is_file()
    assert json.loads((out / "evaluation/summary.json").read_text())["mean"]["n"] == 4
    assert len(list((out / "generated").glob("image_*.nii.gz"))) == 16

    model = (out / "runs/segment/model.safetensors").read_bytes()
    demo.run_demo(out)
    assert (out / "runs/segment/model.safetensors").read_bytes() == model, "a second call trains nothing"
