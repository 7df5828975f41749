"""The whole program on a phantom, in a few minutes: `medseg-diff demo`."""

from pathlib import Path
from typing import Any

from medseg_diff.checkpoint import load_model
from medseg_diff.config import Config
from medseg_diff.config_file import parse_config
from medseg_diff.console import say
from medseg_diff.datasets.layouts import read_dataset
from medseg_diff.datasets.phantom import make_phantom
from medseg_diff.device import choose_device
from medseg_diff.evaluate import run_evaluation
from medseg_diff.generate import generate_files
from medseg_diff.metrics import table
from medseg_diff.segment import segment_files
from medseg_diff.train import train

SEGMENT_MINUTES = 2.0
GENERATE_MINUTES = 0.8


def run_demo(out: Path) -> str:
    """Makes data, trains, segments an unseen scan, evaluates, generates; says where everything is.

    What is there already is used: a second call is quick. Raises UserError.
    """
    data, unseen = out / "data", out / "unseen"
    for folder, cases, seed in ((data, 20, 0), (unseen, 2, 1)):
        if not (folder / "dataset.json").exists():
            say(f"making {cases} phantoms in {folder}")
            make_phantom(folder, cases, "ct", 1, seed)
    device = choose_device()

    say(f"training to segment, {SEGMENT_MINUTES:g} minutes")
    config = _config(out, data, "segment", SEGMENT_MINUTES)
    train(config, out / "runs/segment", device)
    model = load_model(out / "runs/segment/best.safetensors", device)
    scan = read_dataset(unseen).cases[0].image
    reports, refused = segment_files([scan], model, out / "segmentation")
    if refused:
        raise refused[0]
    uri = config.tracking.uri
    summary = run_evaluation(model, (data, "val"), out / "evaluation", samples=None, steps=None, seed=0, uri=uri)

    say(f"training to generate, {GENERATE_MINUTES:g} minutes")
    train(_config(out, data, "generate", GENERATE_MINUTES), out / "runs/generate", device)
    generator = load_model(out / "runs/generate/best.safetensors", device)
    generate_files(generator, out / "generated", 16, steps=None, seed=0)
    return "\n".join([table(summary), "", *_volumes(reports[0]), "", *_places(out, reports[0], uri)])


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
    lines = [f"An unseen scan, {report['scan']}, from {report['samples']} plausible masks:"]
    for label in report["labels"]:
        low, high = label["volume_ml_interval90"]
        lines.append(f"  {label['name']}: {label['volume_ml']:.2f} ml, plausibly {low:.2f} to {high:.2f}")
    return lines


def _places(out: Path, report: dict[str, Any], uri: str) -> list[str]:
    preview = next(path for path in report["written"] if path.endswith("_preview.png"))
    mask = next(path for path in report["written"] if path.endswith("_seg.nii.gz"))
    return [
        f"pictures   {preview}",
        f"           {out / 'runs/segment/process.png'}",
        f"           {out / 'runs/segment/curves.png'}",
        f"           {out / 'generated/grid.png'}",
        f"mask       {mask}",
        f"metrics    {out / 'evaluation/summary.json'}",
        f"model      {out / 'runs/segment/best.safetensors'}",
        f"MLflow     .venv/bin/mlflow ui --backend-store-uri {uri}",
    ]
