"""Experiments in MLflow: the parameters, metrics and files of a run, kept so that runs compare.

Tracking never stops the work. When the store fails, one warning is said, metrics are kept and tried again, and after
three failures in a row the rest of the run goes untracked.
A run records versions and the kind of machine, but no user, host or command.
"""

import contextlib
import importlib.metadata
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from medseg_diff import __version__
from medseg_diff.console import say
from medseg_diff.errors import reason

_FLUSH_EVERY_S = 5
_METRICS_IN_BATCH = 500  # MLflow takes 1000
_MOST_FAILURES = 3  # in a row: a store that is busy for a moment loses nothing, one that is dead costs no more time
_PARAMETERS_IN_BATCH = 100  # MLflow's limit


class Tracker:
    """One open run. Without a client it does nothing: there is no store, or the store has failed."""

    def __init__(self, client: Any, run_id: str | None) -> None:
        self.run_id = run_id
        self._client = client
        self._failures = 0
        self._pending: list[tuple[str, float, int, int]] = []
        self._flushed_s = time.monotonic()

    def log(self, metrics: Mapping[str, float | int | None], step: int) -> None:
        """Log metrics at a step, None left out. They are sent in batches, some seconds later."""
        if self._client is None:
            return
        now_ms = int(time.time() * 1000)
        self._pending += [(name, float(value), now_ms, step) for name, value in metrics.items() if value is not None]
        if len(self._pending) >= _METRICS_IN_BATCH or time.monotonic() - self._flushed_s > _FLUSH_EVERY_S:
            self._attempt(self._flush)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy a file, or a folder of files, to the run's artifacts."""
        self._attempt(lambda: self._client.log_artifact(self.run_id, str(path), folder))

    def text(self, name: str, content: str) -> None:
        """Keep a text among the run's artifacts."""
        self._attempt(lambda: self._client.log_text(self.run_id, content, name))

    def finish(self, ok: bool) -> None:
        """Send what is pending and close the run, as finished or as failed."""
        self._attempt(self._flush)
        self._attempt(lambda: self._client.set_terminated(self.run_id, "FINISHED" if ok else "FAILED"))
        self._client = None

    def _flush(self) -> None:
        from mlflow.entities import Metric

        self._flushed_s = time.monotonic()
        for start in range(0, len(self._pending), _METRICS_IN_BATCH):
            batch = [Metric(*metric) for metric in self._pending[start : start + _METRICS_IN_BATCH]]
            self._client.log_batch(self.run_id, metrics=batch)
        self._pending = []

    def _attempt(self, action: Callable[[], None]) -> None:
        if self._client is None:
            return
        try:
            action()
            self._failures = 0
        except Exception as error:
            self._failures += 1
            if self._failures == 1:
                _warn(error)
            if self._failures == _MOST_FAILURES:
                self._client = None


def start_run(
    uri: str,
    experiment: str,
    name: str,
    params: Mapping[str, object],
    tags: Mapping[str, str],
    run_id: str | None = None,
) -> Tracker:
    """Open a run, or open `run_id` again where the store at `uri` has it. An empty `uri` turns tracking off.

    A resumed run keeps the parameters that it was started with, since MLflow does not let them change. MLflow cuts
    values at 6000 characters.
    """
    if not uri:
        return Tracker(None, run_id)
    try:
        client = connect(uri)
        run_id = _open_run(client, run_id) or _create_run(client, database(uri), experiment, name)
        _describe(client, run_id, params, {**_environment(), **tags})
    except Exception as error:
        _warn(error)
        return Tracker(None, run_id)
    return Tracker(client, run_id)


def _open_run(client: Any, run_id: str | None) -> str | None:
    from mlflow import MlflowException

    if run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    if run.info.lifecycle_stage != "active":
        return None
    client.update_run(run_id, status="RUNNING")
    return run_id


def _create_run(client: Any, path: Path | None, experiment: str, name: str) -> str:
    from mlflow import MlflowException

    found = client.get_experiment_by_name(experiment)
    if found is None:
        folder = re.sub(r"[^\w\-]", "_", experiment)
        location = None if path is None else (path.parent / "mlartifacts" / folder).as_uri()
        # A run that starts at the same moment may be the first to create it.
        with contextlib.suppress(MlflowException):
            client.create_experiment(experiment, artifact_location=location)
        found = client.get_experiment_by_name(experiment)
    return client.create_run(found.experiment_id, run_name=name).info.run_id


def _describe(client: Any, run_id: str, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
    from mlflow.entities import Param, RunTag

    known = client.get_run(run_id).data.params
    new = [Param(key, str(value)) for key, value in params.items() if key not in known]
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    for start in range(0, len(new), _PARAMETERS_IN_BATCH):
        client.log_batch(run_id, params=new[start : start + _PARAMETERS_IN_BATCH])


def _environment() -> dict[str, str]:
    return {
        "version.medseg-diff": __version__,
        "version.python": platform.python_version(),
        "version.torch": importlib.metadata.version("torch"),
        "version.monai": importlib.metadata.version("monai"),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def database(uri: str) -> Path | None:
    """The absolute path of an SQLite store; None for a server or another database."""
    path = uri.removeprefix("sqlite:///")
    return None if path in (uri, "", ":memory:") else Path(path).resolve()


def connect(uri: str) -> Any:
    """MLflow's client of the store at `uri`, a new SQLite store if there is none.

    Silent, without telemetry, and failing within seconds where no server answers; whatever of this the user's
    environment sets otherwise stays.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    from mlflow import MlflowClient
    from mlflow.store.db import utils

    utils.MAX_RETRY_COUNT = 1  # Ten attempts at a database that does not open take 100 s.
    path = database(uri)
    if path is None:
        return MlflowClient(uri)
    if not path.exists():
        _create_database(path)
    return MlflowClient(f"sqlite:///{path}")


def _create_database(path: Path) -> None:
    """Create it aside and link it into place.

    MLflow builds the tables by 70 migrations. Two runs that start together break each other's, and a kill in their
    midst leaves a store that never opens again.
    """
    from mlflow import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".mlflow-") as folder:
        new = Path(folder) / "new.db"
        MlflowClient(f"sqlite:///{new}").search_experiments(max_results=1)
        try:
            path.hardlink_to(new)
        except OSError:  # Another run was first, or the file system has no links.
            if not path.exists():
                new.replace(path)


def _warn(error: Exception) -> None:
    say(
        "warning: MLflow failed, and the run goes on; its own files keep its scores (see tracking.uri). "
        + reason(error)
    )
