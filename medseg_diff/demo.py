"""A real scan by the shipped model, then the whole program on a phantom, in a few minutes: `medseg-diff demo`."""

from pathlib import Path
from typing import Any

import torch

from medseg_diff.checkpoint import Model, load_model, shipped
from medseg_diff.config import Config
from medseg_diff.config_file import parse_config
from medseg_diff.console import say
from medseg_diff.datasets.layouts import read_dataset
from medseg_diff.datasets.phantom import make_phantom
from medseg_diff.device import choose_device
from medseg_diff.evaluate import run_evaluation
from medseg_diff.generate import generate_files
from medseg_diff.metrics import score_masks, table
from medseg_diff.scans.geometry import spacing_of
from medseg_diff.scans.read import read_label_map
from medseg_diff.segment import segment_files
from medseg_diff.train import train

SAMPLE = Path(__file__).resolve().parents[1] / "data/sample"
"""Real scans that stand beside the package in a checkout, and are not installed with it."""

SEGMENT_MINUTES = 2.0
GENERATE_MINUTES = 0.8


def run_demo(out: Path) -> str:
    """Segments a real scan; makes data, trains, segments an unseen phantom, evaluates, generates; says where it all is.

    What is there already is used: a second call is quick. Raises UserError.
    """
    device = choose_device()
    real = _real_scan(out / "sample", device)
    data, unseen = out / "data", out / "unseen"
    for folder, cases, seed in ((data, 20, 0), (unseen, 2, 1)):
        if not (folder / "dataset.json").exists():
            say(f"making {cases} phantoms in {folder}")
            make_phantom(folder, cases, "ct", 1, seed)

    say(f"training to segment, {SEGMENT_MINUTES:g} minutes")
    config = _config(out, data, "segment", SEGMENT_MINUTES)
    train(config, out / "runs/segment", device)
    model = load_model(out / "runs/segment/best.safetensors", device)
    scan = read_dataset(unseen).cases[0].image
    report = _segmented(scan, model, out / "segmentation")
    uri = config.tracking.uri
    summary = run_evaluation(model, (data, "val"), out / "evaluation", samples=None, steps=None, seed=0, uri=uri)

    say(f"training to generate, {GENERATE_MINUTES:g} minutes")
    train(_config(out, data, "generate", GENERATE_MINUTES), out / "runs/generate", device)
    generator = load_model(out / "runs/generate/best.safetensors", device)
    generate_files(generator, out / "generated", 16, steps=None, seed=0)
    unseen_phantom = f"An unseen phantom, {report['scan']}, from {report['samples']} plausible masks:"
    return "\n".join([*real, table(summary), "", unseen_phantom, *_volumes(report), "", *_places(out, report, uri)])


def _real_scan(out: Path, device: torch.device) -> list[str]:
    """What the shipped model says of a scan of the sample, and its reference; nothing where either is absent."""
    path = shipped().get("hippocampus")
    if path is None or not SAMPLE.is_dir():
        say(f"no real scan is segmented: {SAMPLE if path else 'the shipped model'} is not installed")
        return []
    case = read_dataset(SAMPLE).cases[0]
    say(f"segmenting {case.image} by the shipped model, {path}")
    model = load_model(path, device)
    report = _segmented(case.image, model, out)
    found, (reference, affine) = read_label_map(_written(report, "_seg.nii.gz"))[0], read_label_map(case.labels[0])
    scores = score_masks(found, reference, model.about.labels, spacing_of(affine))
    against = [f"; reference {score.reference_ml:.2f} ml, Dice {score.dice:.3f}" for score in scores.values()]
    lines = [f"A real scan, {case.image}, by the shipped model, from {report['samples']} plausible masks:"]
    lines += [line + more for line, more in zip(_volumes(report), against, strict=True)]
    lines.append(f"  picture {_written(report, '_preview.png')}")
    for line in lines:
        say(line)
    return [*lines, ""]


def _segmented(scan: Path, model: Model, out: Path) -> dict[str, Any]:
    reports, refused = segment_files([scan], model, out)
    if refused:
        raise refused[0]
    return reports[0]


def _written(report: dict[str, Any], ending: str) -> str:
    return next(path for path in report["written"] if path.endswith(ending))


def _config(out: Path, data: Path, task: str, minutes: float) -> Config:
    values: dict[str, Any] = {
        "task": task,
        "data": {"root": str(data), "cache": str(out / "cache"), "modality": "ct", "spacing_mm": [0.9, 0.9, 1.5]},
        "train": {"max_minutes": minutes, "batch_size": 2, "validations": 2},
        "segment": {"samples": 16},
        "tracking": {"uri": f"sqlite:///{out / 'mlflow.db'}", "experiment": "demo"},
    }
    if task == "segment":
        values["data"] |= {"spatial_dims": 3, "size": [48, 48, 16]}
    else:
        values["data"] |= {"spatial_dims": 2, "axis": 2, "neighbours": 0, "size": [48, 48], "foreground": 1.0}
        values["network"] = {"kind": "unconditional", "widths": [32, 64, 64, 96]}
        values["diffusion"] = {"pure_noise": 0.0}
        values["train"] |= {"batch_size": 16, "lr": 1e-3, "augment": False, "validations": 1}
        values["segment"] = {"samples": 16, "steps": 24}
    return parse_config(values, "demo")


def _volumes(report: dict[str, Any]) -> list[str]:
    lines = []
    for label in report["labels"]:
        low, high = label["volume_ml_interval90"]
        lines.append(f"  {label['name']}: {label['volume_ml']:.2f} ml, plausibly {low:.2f} to {high:.2f}")
    return lines


def _places(out: Path, report: dict[str, Any], uri: str) -> list[str]:
    return [
        f"pictures   {_written(report, '_preview.png')}",
        f"           {out / 'runs/segment/process.png'}",
        f"           {out / 'runs/segment/curves.png'}",
        f"           {out / 'generated/grid.png'}",
        f"mask       {_written(report, '_seg.nii.gz')}",
        f"metrics    {out / 'evaluation/summary.json'}",
        f"model      {out / 'runs/segment/best.safetensors'}",
        f"MLflow     .venv/bin/mlflow ui --backend-store-uri {uri}",
    ]
