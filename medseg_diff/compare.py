"""Runs side by side: what differs in their parameters, and what came of it."""

import re
import shlex
from datetime import timedelta
from math import isnan
from typing import Any

from medseg_diff.errors import UserError, reason
from medseg_diff.tracking import connect, database

_WIDTH = 100
_CELL = 28  # characters of a name or a value

_SMALL_IS_GOOD = {"loss", "error", "distance", "hd95", "asd", "missed", "invented", "ece", "nll", "brier", "ged", "fid"}


def compare(uri: str, experiment: str | None, metric: str = "val/dice", top: int = 20) -> list[dict[str, Any]]:
    """The `top` runs of a store, or of one experiment, by the last value of `metric`: best first, without it last.

    A row has `run`, `run_id`, `status`, `experiment`, `seconds` (None until the run ends), `metrics`
    (None for nan), `parameters`.
    Raises UserError where there is no store, no such experiment, no run, or no run with the metric.
    """
    path = database(uri)
    where = path or "MLflow"
    if path is not None and not path.exists():
        raise UserError(where, "there is no MLflow store", "Train a run first, or set tracking.uri to your store.")
    try:
        client = connect(uri)
        names = {found.experiment_id: found.name for found in client.search_experiments()}
        chosen = [key for key, name in names.items() if experiment in (None, name)]
        order = f"metrics.`{metric}` {'ASC' if small_is_good(metric) else 'DESC'}"
        runs = client.search_runs(chosen, order_by=[order], max_results=top) if chosen else []
    except Exception as error:
        raise UserError(
            where, f"the store cannot be read ({reason(error)})", "Set tracking.uri to your store."
        ) from error
    if not chosen:
        raise UserError(experiment or where, "there is no such experiment", f"There are: {', '.join(names.values())}.")
    if not runs:
        raise UserError(experiment or where, "there is no run to compare", "Train one first.")
    rows = [_row(run, names[run.info.experiment_id]) for run in runs]
    found = sorted({name for row in rows for name in row["metrics"]})
    if found and metric not in found:
        raise UserError(metric, "no run has this metric", f"There are: {', '.join(found)}.")
    return rows


def _row(run: Any, experiment: str) -> dict[str, Any]:
    return {
        "run": run.info.run_name,
        "run_id": run.info.run_id,
        "status": run.info.status.lower(),
        "experiment": experiment,
        "seconds": (run.info.end_time - run.info.start_time) / 1000 if run.info.end_time else None,
        "metrics": {name: None if isnan(value) else value for name, value in run.data.metrics.items()},
        "parameters": dict(run.data.params),
    }


def small_is_good(metric: str) -> bool:
    """Whether less of a metric is better, told from the words of its name, `group/metric/label`, without the label."""
    return not _SMALL_IS_GOOD.isdisjoint(re.split("[/_]", "/".join(metric.split("/")[:2])))


def render(rows: list[dict[str, Any]], uri: str = "sqlite:///mlflow.db", metric: str = "val/dice") -> str:
    """The rows of `compare` as tables of at most 100 columns, and how to open MLflow's page.

    Shows the metric, with its labels, the parameters that differ and the metrics that have no label.
    """
    found = sorted({name for row in rows for name in row["metrics"]})
    labels = [name for name in found if name.startswith(f"{metric}/")]
    others = [name for name in found if name != metric and name.count("/") < 2]
    parameters = [
        name
        for name in sorted({name for row in rows for name in row["parameters"]})
        if len({row["parameters"].get(name) for row in rows}) > 1
    ]
    columns = [
        [metric, *(_number(row["metrics"].get(metric)) for row in rows)],
        ["status", *(row["status"] for row in rows)],
        ["time", *(_duration(row["seconds"]) for row in rows)],
    ]
    if len({row["experiment"] for row in rows}) > 1:
        columns.append(["experiment", *(row["experiment"] for row in rows)])
    columns += [[name, *(row["parameters"].get(name, "-") for row in rows)] for name in parameters]
    columns += [[name, *(_number(row["metrics"].get(name)) for row in rows)] for name in labels + others]
    database_uri = f"sqlite:///{path}" if (path := database(uri)) else uri
    page = uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {shlex.quote(database_uri)}"
    return "\n\n".join([*_blocks(["run", *(row["run"] for row in rows)], columns), f"All of it in a browser: {page}"])


def _blocks(first: list[str], columns: list[list[str]]) -> list[str]:
    """The columns, beside the first one, in as many tables as their width takes."""
    blocks = [[_aligned(first)]]
    for column in map(_aligned, columns):
        if sum(len(c[0]) + 2 for c in blocks[-1]) + len(column[0]) > _WIDTH:
            blocks.append([_aligned(first)])
        blocks[-1].append(column)
    return ["\n".join("  ".join(line).rstrip() for line in zip(*block, strict=True)) for block in blocks]


def _aligned(column: list[str]) -> list[str]:
    cells = [cell if len(cell) <= _CELL else cell[: _CELL - 3] + "..." for cell in column]
    return [cell.ljust(max(map(len, cells))) for cell in cells]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _duration(seconds: float | None) -> str:
    return "-" if seconds is None else str(timedelta(seconds=round(seconds)))
