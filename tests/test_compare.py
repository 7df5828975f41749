import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from medseg_diff.compare import compare, render, small_is_good
from medseg_diff.errors import UserError
from medseg_diff.tracking import connect, start_run

RUNS = {
    "small": ("hippocampus", {"train.lr": 1e-3, "network.kind": "unet"}, {"val/dice": 0.81, "val/hd95_mm": 1.5}),
    "best": (
        "hippocampus",
        {"train.lr": 1e-4, "network.kind": "conditional"},
        {"val/dice": 0.88, "val/dice/Anterior": 0.87, "val/dice/Posterior": 0.89, "val/hd95_mm": 1.75},
    ),
    "diverged": ("hippocampus", {"train.lr": 1.0, "network.kind": "conditional"}, {"val/dice": math.nan}),
    "started": ("hippocampus", {"train.lr": 1e-4, "network.kind": "conditional"}, {}),
    "pictures": ("generate", {"train.lr": 1e-4}, {"val/fid": 12.0}),
}


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    uri = f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
    for name, (experiment, params, metrics) in RUNS.items():
        tracker = start_run(uri, experiment, name, {"seed": 0, "train.steps": 100, **params}, {})
        tracker.log(metrics, 100)
        if metrics:
            tracker.finish(ok=name != "diverged")
    return uri


def order(uri, *arguments):
    return [row["run"] for row in compare(uri, *arguments)]


def test_best_first_and_unknown_last(uri):
    assert order(uri, "hippocampus") == ["best", "small", "diverged", "started"]
    assert order(uri, "hippocampus", "val/hd95_mm")[:2] == ["small", "best"]
    assert order(uri, "hippocampus", "val/dice", 1) == ["best"]
    assert set(order(uri, None)) == set(RUNS)


def test_a_row(uri):
    row = compare(uri, "hippocampus")[0]
    assert row["status"] == "finished"
    assert row["experiment"] == "hippocampus"
    assert row["metrics"] == RUNS["best"][2]
    assert row["parameters"]["network.kind"] == "conditional"
    assert 0 <= row["seconds"] < 60
    assert connect(uri).get_run(row["run_id"]).info.run_name == "best"
    rows = {row["run"]: row for row in compare(uri, "hippocampus")}
    assert rows["diverged"]["status"] == "failed"
    assert rows["diverged"]["metrics"] == {"val/dice": None}
    assert (rows["started"]["status"], rows["started"]["seconds"]) == ("running", None)


def test_the_last_value_counts(uri, tmp_path):
    shutil.copy(uri.removeprefix("sqlite:///"), tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracker = start_run(uri, "hippocampus", "worse", {}, {})
    tracker.log({"val/dice": 0.99}, 1)
    tracker.log({"val/dice": 0.5}, 2)
    tracker.finish(ok=True)
    assert order(uri, "hippocampus")[:3] == ["best", "small", "worse"]


def test_small_is_good():
    for metric in ("train/loss", "val/hd95_mm", "val/asd_mm/Anterior", "val/volume_error_ml", "val/fid", "hd95_mm"):
        assert small_is_good(metric), metric
    for metric in ("val/dice", "val/dice/loss", "val/surface_dice_1mm", "val/iou", "dice"):
        assert not small_is_good(metric), metric


def test_render_shows_what_differs(uri):
    text = render(compare(uri, "hippocampus"), uri)
    lines = text.splitlines()
    assert max(map(len, lines[:-1])) <= 100
    assert lines[0].split()[:4] == ["run", "val/dice", "status", "time"]
    assert lines[1].split()[:3] == ["best", "0.88", "finished"]
    assert lines[4].split()[:4] == ["started", "-", "running", "-"]
    for shown in ("train.lr", "network.kind", "conditional", "val/dice/Anterior", "val/hd95_mm", "1.75"):
        assert shown in text
    for alike in ("train.steps", "seed", "experiment"):
        assert alike not in text
    assert f"mlflow ui --backend-store-uri {uri}" in lines[-1]
    assert "experiment" in render(compare(uri, None), uri)


def test_render_keeps_within_its_width():
    names = [f"diffusion.a_long_parameter_{i}" for i in range(12)]
    rows = [
        {
            "run": f"{run}" * 60,
            "run_id": run,
            "status": "finished",
            "experiment": "e",
            "seconds": 3725.4,
            "metrics": {"val/dice": 0.5},
            "parameters": dict.fromkeys(names, run * 200),
        }
        for run in "ab"
    ]
    *lines, page = render(rows, "http://server:5000").splitlines()
    assert max(map(len, lines)) <= 100
    assert "1:02:05" in lines[1]
    assert sum(line.count("diffusion.a_long") for line in lines) == 12
    assert page.endswith("http://server:5000")


@pytest.mark.parametrize(
    ("experiment", "metric", "said"),
    [
        ("hipocampus", "val/dice", ["hipocampus", "hippocampus", "generate"]),
        ("hippocampus", "val/dise", ["val/dise", "val/dice, ", "val/hd95_mm"]),
        ("Default", "val/dice", ["Default", "no run"]),
        ("hippocampus", "val/`", ["cannot be read"]),
    ],
)
def test_what_is_not_there_is_said(uri, experiment, metric, said):
    with pytest.raises(UserError) as caught:
        compare(uri, experiment, metric)
    for words in said:
        assert words in str(caught.value)


def test_no_store(tmp_path):
    with pytest.raises(UserError, match=r"mlflow\.db: there is no"):
        compare(f"sqlite:///{tmp_path / 'mlflow.db'}", None)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "garbage.db").write_bytes(b"no database" * 100)
    with pytest.raises(UserError, match=r"garbage\.db: the store cannot be read"):
        compare(f"sqlite:///{tmp_path / 'garbage.db'}", None)


def test_mlflow_is_imported_late():
    code = "import sys, medseg_diff.compare, medseg_diff.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0
