import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medseg_diff import tracking
from medseg_diff.tracking import connect, start_run

RUN = """
import sys
from pathlib import Path
from medseg_diff.tracking import start_run

tracker = start_run("sqlite:///deep/mlflow.db", "knees, left", sys.argv[1], {"train.lr": 0.001}, {"data": "abc"})
tracker.log({"train/loss": 0.5, "val/dice/left": None}, 1)
Path("weights.txt").write_text("weights of " + sys.argv[1])
tracker.artifact(Path("weights.txt"))
tracker.finish(True)
tracker.log({"train/loss": 0.1}, 2)
from mlflow.telemetry.utils import is_telemetry_disabled
print(tracker.run_id, "silent" if is_telemetry_disabled() else "sends")
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder where two processes have made a run each, at once, in a store that was not there; and what they said."""
    folder = tmp_path_factory.mktemp("with space")
    # MLflow keeps its telemetry quiet under pytest and CI by itself; a user has neither.
    environment = {k: v for k, v in os.environ.items() if k not in ("CI", "GITHUB_ACTIONS", "PYTEST_CURRENT_TEST")}
    environment |= {"LOGNAME": "dr-jekyll", "PYTHONPATH": str(Path(tracking.__file__).parents[1])}
    running = []
    for name in "ab":
        (folder / name).mkdir()
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", RUN.replace("deep/", "../deep/"), name],
                cwd=folder / name,
                env={k: v for k, v in environment.items() if not k.startswith("MLFLOW_")},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return folder, [process.communicate(timeout=120) for process in running]


@pytest.fixture
def uri(work, tmp_path):
    """A copy of the store, quick to have."""
    shutil.copy(work[0] / "deep/mlflow.db", tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def warnings(capsys):
    said: list[str] = []

    def sentences() -> list[str]:
        said.extend(line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: "))
        return said

    return sentences


def test_two_first_runs_at_once(work):
    folder = work[0] / "deep"
    client = connect(f"sqlite:///{folder / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    assert experiment.name == "knees, left"
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"a", "b"}
    for name, run in runs.items():
        assert run.info.status == "FINISHED"
        assert run.data.params == {"train.lr": "0.001"}
        assert run.data.metrics == {"train/loss": 0.5}
        assert run.data.tags["data"] == "abc"
        assert run.data.tags["version.python"] == sys.version.split()[0]
        kept = folder / "mlartifacts/knees__left" / run.info.run_id / "artifacts/weights.txt"
        assert kept.read_text() == f"weights of {name}"
    assert sorted(p.name for p in folder.iterdir()) == ["mlartifacts", "mlflow.db"]


def test_nothing_is_said_or_sent(work):
    for stdout, stderr in work[1]:
        assert stderr == ""
        run_id, telemetry = stdout.split()
        assert len(run_id) == 32
        assert telemetry == "silent"


def test_no_user_and_no_host_is_recorded(work):
    stored = (work[0] / "deep/mlflow.db").read_bytes()
    assert b"knees, left" in stored
    for personal in ("dr-jekyll", socket.gethostname(), "mlflow.source.name"):
        assert personal.encode() not in stored, personal


def test_a_resumed_run_goes_on(uri):
    first = start_run(uri, "e", "r", {"train.steps": 100, "train.lr": 0.1}, {})
    first.log({"train/loss": 1.0}, 1)
    first.finish(ok=False)
    assert connect(uri).get_run(first.run_id).info.status == "FAILED"
    second = start_run(uri, "e", "r", {"train.steps": 200, "train.lr": 0.1, "seed": 3}, {}, first.run_id)
    assert second.run_id == first.run_id
    assert connect(uri).get_run(first.run_id).info.status == "RUNNING"
    second.log({"train/loss": 0.5}, 2)
    second.finish(ok=True)
    run = connect(uri).get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"train.steps": "100", "train.lr": "0.1", "seed": "3"}
    history = connect(uri).get_metric_history(first.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 0.5)]


def test_a_run_that_the_store_has_lost_starts_anew(uri, warnings):
    deleted = start_run(uri, "e", "r", {}, {})
    connect(uri).delete_run(deleted.run_id)
    for run_id in ("0" * 32, deleted.run_id):
        tracker = start_run(uri, "e", "r", {}, {}, run_id)
        assert tracker.run_id not in (None, run_id)
    assert warnings() == []


def test_many_and_odd_values(uri, warnings):
    tracker = start_run(uri, "e", "r", {f"p.{i}": "x" * 7000 for i in range(250)}, {})
    for step in range(3):
        tracker.log({f"m/{i}": float(step) for i in range(700)}, step)
    tracker.log({"loss": float("nan"), "huge": float("inf"), "count": 3, "undefined": None}, 3)
    tracker.finish(ok=True)
    assert warnings() == []
    run = connect(uri).get_run(tracker.run_id)
    assert len(run.data.params) == 250
    assert set(run.data.params.values()) == {"x" * 6000}
    assert all(run.data.metrics[f"m/{i}"] == 2 for i in range(700))
    assert run.data.metrics["loss"] != run.data.metrics["loss"]
    assert run.data.metrics["count"] == 3
    assert "undefined" not in run.data.metrics


def test_metrics_arrive_while_the_run_goes_on(uri, monkeypatch):
    tracker = start_run(uri, "e", "r", {}, {})
    tracker.log({"loss": 3.0}, 1)
    assert connect(uri).get_run(tracker.run_id).data.metrics == {}
    monkeypatch.setattr(tracking, "_FLUSH_EVERY_S", 0)
    tracker.log({"loss": 2.0}, 2)
    assert connect(uri).get_run(tracker.run_id).data.metrics == {"loss": 2.0}


def test_a_relative_store_stays_where_it_was(uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = start_run("sqlite:///mlflow.db", "e", "r", {}, {})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    tracker.log({"loss": 1.0}, 1)
    tracker.finish(ok=True)
    assert connect(uri).get_run(tracker.run_id).data.metrics == {"loss": 1.0}
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    "bad",
    [
        "sqlite:///{tmp}/garbage.db",
        "sqlite:///{tmp}/garbage.db/mlflow.db",
        "sqlite:///{tmp}",
        "http://127.0.0.1:9",
        "nonsense://x",
        "{tmp}",
    ],
)
def test_a_bad_store_costs_one_warning(bad, tmp_path, warnings):
    (tmp_path / "garbage.db").write_bytes(b"no database" * 100)
    began_s = time.monotonic()
    tracker = start_run(bad.format(tmp=tmp_path), "e", "r", {"a": 1}, {"b": "c"}, "0" * 32)
    assert time.monotonic() - began_s < 10
    assert tracker.run_id == "0" * 32
    for step in range(1000):
        tracker.log({"loss": 1.0}, step)
    tracker.artifact(tmp_path / "garbage.db")
    tracker.finish(ok=True)
    assert len(warnings()) == 1
    assert "tracking.uri" in warnings()[0]


def test_a_store_that_breaks_on_the_way_costs_one_warning(uri, tmp_path, warnings):
    tracker = start_run(uri, "e", "r", {}, {})
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        store.execute("drop table metrics")
    for step in range(2000):
        tracker.log({"loss": 1.0}, step)
    tracker.artifact(tmp_path / "mlflow.db")
    tracker.finish(ok=True)
    assert len(warnings()) == 1


def test_no_store_no_tracking(warnings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = start_run("", "e", "r", {}, {})
    tracker.log({"loss": 1.0}, 1)
    tracker.finish(ok=True)
    assert tracker.run_id is None
    assert warnings() == []
    assert list(tmp_path.iterdir()) == []


def test_the_users_environment_stays(uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    connect(uri)
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "false"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "60"
