"""Masks against references: `medseg-diff evaluate`, and the validation of training."""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from medseg_diff.checkpoint import Model
from medseg_diff.config import SAMPLING, Tracking, flatten, plain
from medseg_diff.console import progress, say
from medseg_diff.datasets.ambiguous import Truth, read_truth
from medseg_diff.datasets.folders import label_names, matched
from medseg_diff.datasets.layouts import Case, Dataset, digest, read_dataset, split
from medseg_diff.datasets.pipeline import onto_grid
from medseg_diff.datasets.reading import read_case, read_reference
from medseg_diff.diffusion.masks import IGNORED
from medseg_diff.errors import UserError
from medseg_diff.files import replacing
from medseg_diff.metrics import LabelScore, label_keys, score_masks, summarize, write_cases_csv
from medseg_diff.scans.geometry import check_same_grid, spacing_of
from medseg_diff.scans.preview import draw_preview
from medseg_diff.scans.read import Scan, read_label_map
from medseg_diff.segmentation import Segmentation, probability_frames, segment_scan
from medseg_diff.tracking import start_run
from medseg_diff.uncertainty.exact import exact_measures
from medseg_diff.uncertainty.fitting import Fitting
from medseg_diff.uncertainty.report import Collection, draw_reliability


def evaluate_model(
    model: Model,
    cases: Sequence[Case],
    *,
    samples: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    preview: Path | None = None,
    reliability: Path | None = None,
    fitting: Fitting | None = None,
) -> dict[str, Any]:
    """Segments every case by the code of `segment`, case i with seed + i, and scores the masks; each rater counts.

    `mean` gains the measures of `medseg_diff.uncertainty`: calibration over all voxels, and, a label each and mean over
    cases, expected_dice/LABEL and what the samples are worth, where the model draws any: coverage90/LABEL, the share of
    reference volumes inside the reported interval, coverage90_raw/LABEL and width90_raw/LABEL, of the samples' own
    quantiles, agreement/LABEL, ged2/LABEL and so on. The sampled masks are compared on the network's grid.
    expected_dice_correlation and agreement_correlation are Spearman's with the true Dice over cases, mean over labels.
    A case whose truth is known is held against it, too (`exact_measures`). `preview` receives a picture of the first
    case, `reliability` the diagram, `fitting` what is needed to calibrate the intervals.
    """
    settings, names = model.about.config.segment, model.about.labels
    drawing = model.about.config.network.kind in SAMPLING
    scores: dict[str, dict[int, LabelScore]] = {}
    collection = Collection()
    with progress("evaluating", len(cases)) as advance:
        for index, case in enumerate(cases):
            scan = read_case(case, len(model.about.channels))
            count = (samples or settings.samples) if drawing else 0
            with tempfile.TemporaryDirectory() as folder:
                keep = Path(folder) if drawing else None
                found = segment_scan(
                    model, scan, samples=count, steps=steps or settings.steps, seed=seed + index, keep=keep
                )
                rated, references = [], []
                for rater, path in enumerate(case.labels):
                    reference = read_reference(path, scan)
                    known = reference != case.ignore
                    name = case.name if len(case.labels) == 1 else f"{case.name} rater {rater}"
                    scores[name] = score_masks(found.label_map * known, reference * known, names, scan.spacing_mm)
                    rated.append(scores[name])
                    references.append(np.where(known, _indices(reference, names), np.uint8(IGNORED)))
                    frames = probability_frames(found.prediction, found.affine, scan)
                    collection.calibration.add(frames, references[-1])
                grid = found.prediction.probabilities.shape[1:]
                moved = np.stack([onto_grid(map_, scan.affine, found.affine, grid) for map_ in references])
                _collect(collection, found, rated, moved, names, fitting)
                if fitting is not None:
                    fitting.cases += 1
                if case.truth is not None:
                    _hold_against_truth(collection, read_truth(case.truth), found, scan, names, index)
            if preview is not None and index == 0:
                shown = {value: name for value, name in names.items() if value}
                draw_preview(scan.array[0], found.label_map, found.uncertainty, scan.affine, shown, preview, case.name)
            advance()
    summary = summarize(scores, names)
    summary["mean"] |= collection.means()
    if reliability is not None:
        draw_reliability(collection.calibration, reliability)
    return summary


def _indices(label_map: np.ndarray, names: dict[int, str]) -> np.ndarray:
    """Positions among the names, in place of label values; what has no name is background."""
    found = np.zeros(label_map.shape, np.uint8)
    for index, value in enumerate(names):
        found[label_map == value] = index
    return found


def _collect(
    collection: Collection,
    found: Segmentation,
    rated: Sequence[dict[int, LabelScore]],
    references: np.ndarray,
    names: dict[int, str],
    fitting: Fitting | None,
) -> None:
    """What a case says of its own uncertainty, against the masks of its raters, all on the network's grid."""
    drawn, keys = found.prediction, label_keys(names)
    for label in found.labels:
        dice = float(np.mean([scores[label.value].dice for scores in rated]))
        estimates = {"expected_dice": label.expected_dice, "agreement": label.agreement}
        collection.add_estimates(keys[label.value], dice, **estimates)
    if drawn.tally is None or drawn.samples is None:
        return
    samples, ignored = drawn.samples, (references == IGNORED).any(0)
    if ignored.any():
        samples, references = (np.where(ignored, np.uint8(IGNORED), maps) for maps in (samples, references))
    volumes_ml = drawn.tally.counts.numpy() * float(np.prod(spacing_of(found.affine.numpy()))) / 1000
    for label in found.labels:
        key, index = keys[label.value], list(names).index(label.value)
        collection.add_samples(key, samples, references, index)
        if ignored.any():  # then the volume is not known
            continue
        references_ml = [scores[label.value].reference_ml for scores in rated]
        if label.volume_ml_interval90 is not None:
            for reference_ml in references_ml:
                collection.add_volumes(key, volumes_ml[:, index], label.volume_ml_interval90, reference_ml)
        if fitting is not None:
            fitting.add_volumes(label.value, volumes_ml[:, index], np.array(references_ml))


def _hold_against_truth(
    collection: Collection, truth: Truth, found: Segmentation, scan: Scan, names: dict[int, str], index: int
) -> None:
    """Against the exact law of an ambiguous phantom, which is known on the grid of its files only."""
    samples = found.prediction.samples
    if samples is None or samples.shape[1:] != scan.shape or not np.allclose(found.affine, scan.affine, atol=1e-3):
        say(f"warning: {scan.path}: not held against its truth, for the samples are on another grid or there are none")
        return
    intervals = {label.value: label.volume_ml_interval90 for label in found.labels if label.volume_ml_interval90}
    drawn = np.array(list(names))[np.asarray(samples)]
    collection.add(exact_measures(truth, drawn, intervals, np.random.default_rng(index)))


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
    pairs = matched(predictions, references)
    values = {int(v) for pair in pairs.values() for path in pair for v in np.unique(read_label_map(path)[0])}
    names = label_names(references, values)
    scores = {}
    for name, (path, reference_path) in pairs.items():
        (found, affine), (reference, reference_affine) = read_label_map(path), read_label_map(reference_path)
        check_same_grid(path, found.shape, affine, reference_path, reference.shape, reference_affine)
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
        elif which == "val" and model.about.calibration is not None:
            say("note: these cases chose and calibrated the model; `info` has the coverage by cross-validation")
        pictures = [out / "preview.png", out / "reliability.png"]
        preview, reliability = pictures
        summary = evaluate_model(
            model, cases, samples=samples, steps=steps, seed=seed, preview=preview, reliability=reliability
        )
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
