"""The demonstration, with seconds of training in the place of minutes: every room of the house is walked through."""

import json
import re
from pathlib import Path

import pytest

from medseg_diff import demo


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
