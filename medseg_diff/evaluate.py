"""Masks against references: `medseg-diff evaluate`, and the validation of training."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from medseg_diff.checkpoint import Model
from medseg_diff.config import SAMPLING, Tracking, flatten, plain
from medseg_diff.console import progress, say
from medseg_diff.datasets.layouts import Case, Dataset, digest, read_dataset, split, survey
from medseg_diff.ensemble import agreement
from medseg_diff.errors import UserError
from medseg_diff.files import replacing
from medseg_diff.metrics import LabelScore, label_keys, score_masks, summarize, write_cases_csv
from medseg_diff.scans.geometry import spacing_of
from medseg_diff.scans.preview import draw_preview
from medseg_diff.scans.read import find_scans, read_label_map, read_scan, scan_name
from medseg_diff.segment import segment_scan
from medseg_diff.tracking import start_run


def evaluate_model(
    model: Model,
    cases: Sequence[Case],
    *,
    samples: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    preview: Path | None = None,
) -> dict[str, Any]:
    """Segments every case by the code of `segment`, case i with seed + i, and scores the masks; each rater counts.

    `mean` gains coverage90/LABEL, the share of reference volumes inside the reported interval, and agreement/LABEL,
    where the model draws samples. `preview` receives a picture of the first case.
    """
    settings, names = model.about.config.segment, model.about.labels
    drawing = model.about.config.network.kind in SAMPLING
    scores: dict[str, dict[int, LabelScore]] = {}
    inside: dict[int, list[bool]] = {value: [] for value in names if value}
    agreements: list[np.ndarray] = []
    with progress("evaluating", len(cases)) as advance:
        for index, case in enumerate(cases):
            scan = read_scan(case.image, len(model.about.channels))
            count = (samples or settings.samples) if drawing else 0
            found = segment_scan(model, scan, samples=count, steps=steps or settings.steps, seed=seed + index)
            for rater, path in enumerate(case.labels):
                reference, affine = read_label_map(path)
                _check_grid(path, reference, affine, case.image, scan.shape, scan.affine)
                name = case.name if len(case.labels) == 1 else f"{case.name} rater {rater}"
                scores[name] = score_masks(found.label_map, reference, names, scan.spacing_mm)
                for label in found.labels:
                    if label.volume_ml_interval90 is not None:
                        low, high = label.volume_ml_interval90
                        inside[label.value].append(low <= scores[name][label.value].reference_ml <= high)
            if found.prediction.tally is not None:
                agreements.append(agreement(found.prediction.tally))
            if preview is not None and index == 0:
                shown = {value: name for value, name in names.items() if value}
                draw_preview(scan.array[0], found.label_map, found.uncertainty, scan.affine, shown, preview, case.name)
            advance()
    summary = summarize(scores, names)
    if agreements:
        keys, means = label_keys(names), np.mean(agreements, axis=0)
        for index, value in enumerate(names):
            if value:
                summary["mean"][f"coverage90/{keys[value]}"] = float(np.mean(inside[value]))
                summary["mean"][f"agreement/{keys[value]}"] = float(means[index])
    return summary


def choose_cases(dataset: Dataset, model: Model, which: str) -> tuple[Case, ...]:
    """The cases of `val` or `train`, by the model's own split, or `all`. Raises UserError where the labels differ."""
    if dataset.labels != model.about.labels:
        what = f"its labels are {dataset.labels}, and the model knows {model.about.labels}"
        raise UserError(dataset.root, what, "Evaluate on a data set with the model's labels.")
    data = model.about.config.data
    training, validation = split(dataset, data.folds, data.fold)
    match which:
        case "val":
            cases = validation
        case "train":
            cases = training
        case "all":
            cases = dataset.cases
        case _:
            raise UserError(f"--split {which}", "there is no such split", "Choose val, train or all.")
    if not any(case.labels for case in cases):
        raise UserError(dataset.root, f"no case of the split {which} has a label map", "Evaluate on labelled cases.")
    return tuple(case for case in cases if case.labels)


def evaluate_folders(predictions: Path, references: Path) -> dict[str, Any]:
    """Scores label maps against those of the same name, with or without `_seg`. Raises UserError.

    A reference without a prediction is an error; a prediction without a reference is left out.
    """
    pairs = _pairs(predictions, references)
    values = {int(v) for pair in pairs.values() for path in pair for v in np.unique(read_label_map(path)[0])}
    names = _names(references, values)
    scores = {}
    for name, (path, reference_path) in pairs.items():
        (found, affine), (reference, reference_affine) = read_label_map(path), read_label_map(reference_path)
        _check_grid(path, found, affine, reference_path, reference.shape, reference_affine)
        scores[name] = score_masks(found, reference, names, spacing_of(reference_affine))
    return summarize(scores, names)


def run_evaluation(
    model: Model | None,
    sources: tuple[Path, Path | str],
    out: Path,
    *,
    samples: int | None,
    steps: int | None,
    seed: int,
    uri: str | None,
) -> dict[str, Any]:
    """Evaluates a model on (data set, split), or (predictions, references) without one; writes and tracks scores."""
    parameters: dict[str, Any]
    which, text = "val", ""
    if model is None:
        predictions, references = map(Path, sources)
        summary = evaluate_folders(predictions, references)
        parameters, tags, pictures = {"predictions": predictions.name, "references": references.name}, {}, []
        experiment, name = Tracking().experiment, f"evaluate {predictions.name}"
    else:
        root, which = Path(sources[0]), str(sources[1])
        dataset = read_dataset(root)
        cases, found = choose_cases(dataset, model, which), digest(dataset)
        if which != "all" and found != model.about.dataset.get("dataset_digest"):
            say(f"warning: {root} is not what the model was trained on as it is now: it may have seen cases of {which}")
        pictures = [out / "preview.png"]
        summary = evaluate_model(model, cases, samples=samples, steps=steps, seed=seed, preview=pictures[0])
        options = {"data": root.name, "split": which, "samples": samples, "steps": steps, "seed": seed}
        parameters = flatten({"evaluate": options, **plain(model.about.config)})
        tags = {"model_digest": model.digest, "dataset": dataset.name, "dataset_digest": found}
        text = yaml.safe_dump(plain(model.about.config), sort_keys=False)
        experiment, name = model.about.config.tracking.experiment, f"evaluate {model.path.parent.name}"
    paths = write_summary(summary, out)
    tracker = start_run(
        uri or os.environ.get("MLFLOW_TRACKING_URI") or Tracking().uri, experiment, name, parameters, tags
    )
    tracker.log(logged(summary, which), 0)
    for path in [*paths, *pictures]:
        tracker.artifact(path)
    if model is not None:
        tracker.text("config.yaml", text)
        tracker.artifact(model.path)
    tracker.finish(ok=True)
    return summary


def write_summary(summary: dict[str, Any], out: Path) -> list[Path]:
    """`summary.json` and `cases.csv`."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "summary.json", out / "cases.csv"]
    writers: list[Callable[[Path], object]] = [
        lambda path: path.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n"),
        lambda path: write_cases_csv(summary, path),
    ]
    for path, write in zip(paths, writers, strict=True):
        with replacing(path) as temporary:
            write(temporary)
    return paths


def logged(summary: dict[str, Any], prefix: str = "val") -> dict[str, float]:
    """The means that are defined, as metrics of a split: val/dice, val/dice/LABEL, ..."""
    return {f"{prefix}/{name}": float(value) for name, value in summary["mean"].items() if value is not None}


def _check_grid(
    path: Path, found: np.ndarray, affine: np.ndarray, other: Path, shape: tuple[int, ...], other_affine: np.ndarray
) -> None:
    if found.shape != shape:
        (ours, theirs) = ("x".join(map(str, lengths)) for lengths in (found.shape, shape))
        what = f"it is {ours} voxels large, and {other} is {theirs}"
    elif not np.allclose(affine, other_affine, atol=1e-3):
        what = f"it lies elsewhere in the world than {other}: their affines differ"
    else:
        return
    raise UserError(path, what, "Resample the label map onto the other's grid.")


def _pairs(predictions: Path, references: Path) -> dict[str, tuple[Path, Path]]:
    found, wanted = ({_stem(path): path for path in _maps(folder)} for folder in (predictions, references))
    if not wanted:
        raise UserError(references, "it holds no label maps", "Name a folder of NIfTI, NRRD or MHA files.")
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise UserError(predictions, f"it has no mask for {listed}", "Give every reference a mask of the same name.")
    return {name: (found[name], wanted[name]) for name in sorted(wanted)}


def _maps(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(folder, "there is no such folder", "Name the folder that holds the label maps.")
    other = ("_uncertainty", "_prob", "_samples", "_preview")
    return [path for path in find_scans([folder]) if path.is_file() and not scan_name(path).endswith(other)]


def _stem(path: Path) -> str:
    return scan_name(path).removesuffix("_seg")


def _names(references: Path, found: set[int]) -> dict[int, str]:
    """Names from a data set's description beside the references, else the values themselves."""
    values = sorted(found - {0})
    for folder in (references, references.parent):
        if (folder / "dataset.json").is_file():
            known = survey(folder)[0].labels
            return {0: "background"} | {value: known.get(value, str(value)) for value in values}
    return {0: "background"} | {value: str(value) for value in values or [1]}
