"""What samples cost, what growth costs, and nnU-Net and MedSegDiff beside it. Writes docs/speed.md and its figure.

    .venv/bin/python benchmarks/speed.py --data FOLDER

FOLDER is Task04_Hippocampus of the Decathlon. All on one thread, in CPU seconds, so that other work does not count.
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from comparators import nnunet
from comparators.protocol import CPU, ROOT, Run, circumstances, configuration, model_of
from comparators.speed_tables import THEIR_SAMPLES, draw, page

from medseg_diff.checkpoint import Model, build
from medseg_diff.datasets.cache import Volume, load_volumes
from medseg_diff.datasets.layouts import Case, Dataset, read_dataset, split
from medseg_diff.datasets.pipeline import preprocessing
from medseg_diff.inference import predict
from medseg_diff.scans.read import read_scan
from medseg_diff.segmentation import segment_scan
from medseg_diff.training.state import begin
from medseg_diff.training.step import take_step

SAMPLES, STEPS, SLICES, CLASSES = (1, 4, 16, 64), (1, 2, 4), (8, 16, 32, 64), (2, 8, 32)
LARGE = (128, 128, 128)
Seconds = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=ROOT / "runs/benchmark")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), help="none: the page alone, of what was measured")
    options = parser.parse_args()
    options.work, options.data = options.work.resolve(), options.data.resolve()
    for folder in (options.work, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    kept = options.work / "speed.json"
    found = json.loads(kept.read_text()) if kept.exists() else {}
    for part in options.parts:
        found[part] = {**PARTS[part](options), **circumstances()}
        kept.write_text(json.dumps(found, indent=1) + "\n")
    text = page(found, options.repeats)
    (options.out / "speed.md").write_text(text)
    if "growth" in found:
        draw(found["growth"], options.out / "speed.png")
    print(text)


def interleaved(calls: Mapping[str, Callable[[], object]], repeats: int) -> Seconds:
    """CPU seconds of every call, in turns after a first one that does not count: what slows one slows all."""
    seconds: Seconds = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            begun = time.process_time()
            call()
            if repeat:
                seconds[name].append(time.process_time() - begun)
    return seconds


def untrained(options: argparse.Namespace, config: str, *settings: str, classes: int = 3) -> Model:
    """Time does not depend on the weights."""
    run = Run("speed", config, 0, 0.0, options.data, options.work)
    made = configuration(run, settings)
    labels = {index: f"label {index}" for index in range(classes)}
    dataset = Dataset(options.data, "speed", labels, ("MR",), (), "MR")
    return model_of(build(made, 1, classes), made, dataset)


def drawn(model: Model, image: torch.Tensor, samples: int = 16, steps: int = 1) -> Callable[[], object]:
    return lambda: predict(model, image, samples=samples, steps=steps, seed=0)


def cases_of(options: argparse.Namespace) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    return split(read_dataset(options.data), 5, 0)


def volumes_of(options: argparse.Namespace, cases: tuple[Case, ...], model: Model) -> list[Volume]:
    data = model.about.config.data
    return load_volumes(cases, preprocessing(data), values=[0, 1, 2], channels=1, folder=data.cache)


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """16 samples beside one pass of the U-Net, on a volume of the data set and on a large one in one window."""
    found = {}
    scan = cases_of(options)[1][0]
    for size, wide in (("one volume of Task04", ()), ("x".join(map(str, LARGE)), ("data.size=[96, 96, 64]",))):
        ours = untrained(options, "hippocampus", *wide)
        unet = untrained(options, "hippocampus", "network.kind=unet", *wide)
        image = torch.randn(1, *LARGE) if wide else volumes_of(options, (scan,), ours)[0].image
        calls = {"unet": drawn(unet, image, samples=0), "ours": drawn(ours, image)}
        found[size] = {"shape": list(image.shape[1:]), **interleaved(calls, options.repeats)}
    return {"volumes": found}


def training(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a training step, its crops included, of slices at one patch and batch."""
    cases, held_out = cases_of(options)
    calls, size, batch = {}, (0, 0), 0
    for name, settings in (
        ("ours", ("train.precision=auto",)), ("ours, fp32", ("train.precision=fp32",)),
        ("our U-Net", ("network.kind=unet",)), ("our U-Net, fp32", ("network.kind=unet", "train.precision=fp32")),
    ):  # fmt: skip
        model = untrained(options, "hippocampus_slices", *settings)
        config = model.about.config
        volumes, state = volumes_of(options, cases[:20], model), begin(config, 1, 3, CPU)
        size, batch = config.data.size, config.train.batch_size
        calls[name] = lambda state=state, config=config, volumes=volumes: take_step(state, config, volumes, 3)
    out = options.work / "speed_training"
    names = {"train": [case.name for case in cases[:20]], "predict": [held_out[0].name]}
    nnunet.set_up(options.data)
    nnunet.drive(configuration="2d", measure=options.repeats, patch=size, batch=batch, out=str(out), **names)
    seconds = interleaved(calls, options.repeats)
    seconds["nnU-Net"] = json.loads((out / "speed.json").read_text())["step_s"]
    return {"patch": list(size), "batch": batch, "seconds": seconds}


def volumes(options: argparse.Namespace) -> dict[str, Any]:
    """From the file to mask and probabilities; nnU-Net with its overlapping windows and mirroring."""
    cases, held_out = cases_of(options)
    scans = [case.image for case in held_out[:3]]
    seconds = {}
    for name, config, settings, samples in (
        ("ours, 16 samples, 3D", "hippocampus", (), 16), ("ours, 16 samples, 2D", "hippocampus_slices", (), 16),
        ("our U-Net, 3D", "hippocampus", ("network.kind=unet",), 0),
    ):  # fmt: skip
        model = untrained(options, config, *settings)
        calls = {
            scan.name: lambda model=model, scan=scan, samples=samples: segment_scan(
                model, read_scan(scan, 1), samples=samples, steps=1, seed=0
            )
            for scan in scans
        }
        seconds[name] = [median(values) for values in interleaved(calls, 3).values()]
    nnunet.set_up(options.data)
    for name, configuration_name in (("nnU-Net 3D", "3d_fullres"), ("nnU-Net 2D", "2d")):
        out = options.work / f"speed_{configuration_name}"
        names = {"train": [cases[0].name], "predict": [case.name for case in held_out[:3]]}
        nnunet.drive(configuration=configuration_name, measure=0, out=str(out), **names)
        seconds[name] = list(json.loads((out / "prediction.json").read_text()).values())
    return {"seconds": seconds}


def medsegdiff(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds a slice: our medsegdiff_v2 at its default configuration, timed at 2 and 4 steps; ours in 2D and in 3D."""
    theirs = untrained(options, "medsegdiff_v2")
    image = volumes_of(options, cases_of(options)[1][:1], theirs)[0].image
    calls = {f"{steps} steps": drawn(theirs, image, THEIR_SAMPLES, steps) for steps in (2, 4)}
    calls |= {
        "ours, 2D": drawn(untrained(options, "hippocampus_slices"), image),
        "ours, 3D": drawn(untrained(options, "hippocampus"), image),
    }
    return {"slices": image.shape[1], "seconds": interleaved(calls, 3)}


def growth(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds with more of one thing: samples, steps and classes in 3D on one volume, slices in 2D."""
    model, flat = untrained(options, "hippocampus"), untrained(options, "hippocampus_slices")
    image = volumes_of(options, cases_of(options)[1][:1], model)[0].image
    grown = {
        "samples": {n: drawn(model, image, samples=n) for n in SAMPLES},
        "steps": {n: drawn(model, image, steps=n) for n in STEPS},
        "slices": {n: drawn(flat, torch.randn(1, n, 48, 40)) for n in SLICES},
        "classes": {n: drawn(untrained(options, "hippocampus", classes=n), image) for n in CLASSES},
    }
    return {what: interleaved({str(n): call for n, call in calls.items()}, 3) for what, calls in grown.items()}


PARTS = {
    "sampling": sampling, "training": training, "volumes": volumes, "medsegdiff": medsegdiff, "growth": growth,
}  # fmt: skip


if __name__ == "__main__":
    main()
