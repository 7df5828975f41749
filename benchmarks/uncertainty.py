"""Uncertainty at equal CPU time: ours and other ways to it, in one run. Writes docs/uncertainty.md and its figure.

    .venv/bin/python benchmarks/uncertainty.py --data FOLDER

FOLDER is Task04_Hippocampus of the Decathlon. Runs that are under --work already, as those of accuracy.py, are not
repeated.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from comparators.ensemble import MEMBERS
from comparators.judge import bootstrap, differences, mean
from comparators.protocol import ROOT, Run, ensure, finished, origin

from medseg_diff.figures import Panel, draw_lines


@dataclass(frozen=True)
class Row:
    """A method: what the table calls it; its configuration, samples and cases where they are not those of all."""

    title: str
    config: str | None = None
    samples: int | None = None
    cases: int | None = None


FEW = {"samples": 5, "cases": 8}
"""For the denoisers at full resolution, whose samples cost much."""

ROWS = {
    "conditional": Row("ours"),
    "unet": Row("our U-Net"),
    "temperature": Row("U-Net, temperature"),
    "ensemble": Row(f"{MEMBERS} U-Nets"),
    "mc_dropout": Row("MC dropout"),
    "ssn": Row("SSN, rank 10"),
    "nnunet_2d": Row("nnU-Net 2D"),
    "nnunet_3d": Row("nnU-Net 3D"),
    "monai_ddpm": Row("MONAI's DDPM, 2D, 20 DDIM steps", "hippocampus_slices", **FEW),
    "v1": Row("MedSegDiff V1, as the paper, 10 steps", "medsegdiff_v1", **FEW),
    "v2": Row("MedSegDiff V2, as the paper, 10 steps", "medsegdiff_v2", **FEW),
    "v2_x0": Row("V2, predicting x0, cosine, b = 0.2, 10 steps", "medsegdiff_v2", **FEW),
}
DERIVED = ("temperature", "ensemble", "audit")
"""Methods that use what others have trained."""

AUDIT_SAMPLES = 16

VOXELS = {
    "dice": "Dice", "nll": "NLL", "ece": "ECE", "ece_band": "ECE near borders", "confident_errors": "confident errors",
    "expected_dice": "expected Dice", "expected_dice_rank": "rank correlation",
}  # fmt: skip
SAMPLES = {
    "coverage": "coverage", "width": "width", "crps": "CRPS", "ged2": "GED²", "agreement": "agreement",
    "one_sample": "Dice of a sample",
}  # fmt: skip
PAIRED = ("dice", "crps", "ged2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=ROOT / "runs/benchmark")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    parser.add_argument("--config", default="hippocampus")
    parser.add_argument("--minutes", type=float, default=7.0, help="CPU minutes of a training")
    parser.add_argument("--seeds", type=int, default=1, help="of every method but nnU-Net, which draws its own")
    parser.add_argument("--methods", nargs="*", default=[*ROWS, "audit"], choices=[*ROWS, "audit"])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--cases", type=int, help="judge the first so many cases alone")
    parser.add_argument("--table", action="store_true", help="make the table of the runs that are there")
    options = parser.parse_args()
    options.work, options.data = options.work.resolve(), options.data.resolve()
    for folder in (options.work, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    runs = [
        run_of(method, seed, options)
        for seed in range(options.seeds)
        for method in options.methods
        if seed == 0 or not method.startswith("nnunet")
    ]
    if not options.table:
        needed = {
            run_of("unet", run.seed + k, options) for run in runs if run.method == "ensemble" for k in range(MEMBERS)
        }
        needed |= {run_of("unet", run.seed, options) for run in runs if run.method == "temperature"}
        needed |= {run_of("conditional", run.seed, options) for run in runs if run.method == "audit"}
        first = [run for run in runs if run.method not in DERIVED]
        ensure([*first, *sorted(needed - set(first), key=lambda run: run.path)])
        ensure([run for run in runs if run.method in DERIVED])
    found = finished(runs)
    text = page(found, options)
    (options.out / "uncertainty.md").write_text(text)
    draw(found, options.out / "uncertainty.png")
    print(text)


def run_of(method: str, seed: int, options: argparse.Namespace) -> Run:
    run = Run(
        method, options.config, seed, options.minutes, options.data, options.work, None, options.cases, options.samples
    )
    if method == "audit":
        return replace(run, samples=min(AUDIT_SAMPLES, options.samples))
    row = ROWS[method]
    own = {name: value for name in ("config", "samples", "cases") if (value := getattr(row, name)) is not None}
    if "cases" in own and options.cases:
        own["cases"] = min(own["cases"], options.cases)
    return replace(run, **own)


def by_method(found: dict[Run, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    gathered = {method: [r for run, r in found.items() if run.method == method] for method in ROWS}
    return {method: results for method, results in gathered.items() if results}


def page(found: dict[Run, dict[str, Any]], options: argparse.Namespace) -> str:
    methods = by_method(found)
    newline = "\n"
    return f"""# Uncertainty at equal CPU time

Task04_Hippocampus, cases i with i % 5 != 0 to train on, the others to judge; `configs/{options.config}.yaml` and one
protocol for all: the same crops, augmentation, optimizer and course of the learning rate, {options.minutes:g} CPU
minutes of training on one thread. nnU-Net has its own of all that, and its masks are empty after so short a time.
What is learned of the cases that are judged: the temperature of the scaled U-Net, from the other four fifths of them.
Our U-Net learns by Dice and cross-entropy; an ensemble of {MEMBERS} has {MEMBERS} times the training. Values are means
over labels, and over seeds where there are several.

Probabilities, over all voxels: NLL; expected calibration error, of all voxels and within 3 voxels of the reference's
borders; the share of wrong voxels at a confidence of .99 or more; the Dice that the probabilities let expect, which
should equal the Dice beside it, and its rank correlation with the true one over cases.

| method | seeds | cases | {" | ".join(VOXELS.values())} |
|---|---|---|{"---|" * len(VOXELS)}
{newline.join(line(method, results, VOXELS, str(len(results))) for method, results in methods.items())}

Samples: the share of cases whose reference volume lies between the 5th and the 95th percentile of the samples' volumes
(numpy's linear ones: a right sampler has .79 at n = 16 and .87 at n = 64), the interval's width and the CRPS relative
to the reference's volume, GED² with one rater (2 E d(S, Y) - E d(S, S'), d = 1 - IoU), mean Dice between two samples,
mean Dice of a sample. A method without samples counts as one that draws its mask each time. Coverage alone says little:
too wide an interval covers, too. CRPS and GED² are proper, smaller is better.

| method | n | cases | {" | ".join(SAMPLES.values())} | CPU-s a volume |
|---|---|---|{"---|" * len(SAMPLES)}---|
{newline.join(line(m, results, SAMPLES, count(m, results, options), cost=True) for m, results in methods.items())}

Ours - the other, on the cases and seeds that both have; 95 % interval by a bootstrap over seeds and cases.

| | {" | ".join({**VOXELS, **SAMPLES}[measure] for measure in PAIRED)} |
|---|{"---|" * len(PAIRED)}
{newline.join(against(methods))}
{audit(found)}
![CRPS against NLL](uncertainty.png)

Made by `.venv/bin/python benchmarks/uncertainty.py --data FOLDER`; seeds 0 to {options.seeds - 1}, the ensemble's
members those and the {MEMBERS - 1} next; {origin(found)}.
"""


def line(method: str, results: list[dict[str, Any]], measures: dict[str, str], n: str, cost: bool = False) -> str:
    numbers = [shown(mean([r["measures"][measure] for r in results])) for measure in measures]
    if cost:
        numbers.append(f"{mean([r['seconds_a_volume'] for r in results]):.2f}")
    return f"| {ROWS[method].title} | {n} | {len(results[0]['cases'])} | {' | '.join(numbers)} |"


def count(method: str, results: list[dict[str, Any]], options: argparse.Namespace) -> str:
    match method:
        case "ensemble":
            return str(MEMBERS)
        case "unet" | "temperature" | "nnunet_2d" | "nnunet_3d":
            return "1"
    return str(results[0]["run"]["samples"])


def shown(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.4f}" if abs(value) < 0.1 else f"{value:.3f}"


def against(methods: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = []
    for method, results in methods.items():
        if method == "conditional" or "conditional" not in methods:
            continue
        cells = []
        for measure in PAIRED:
            apart = differences(methods["conditional"], results, measure)
            low, high = bootstrap(apart)
            cells.append(f"{np.nanmean(apart):+.4f} ({low:+.4f} to {high:+.4f})")
        lines.append(f"| {ROWS[method].title} | {' | '.join(cells)} |")
    return lines


def audit(found: dict[Run, dict[str, Any]]) -> str:
    """What the noisy state contributes."""
    results = [r["given"] for run, r in found.items() if run.method == "audit"]
    if not results:
        return ""
    measures = {"dice": "Dice of the mean head", **SAMPLES}
    lines = [
        f"| {given} | {' | '.join(shown(mean([r[given]['measures'][m] for r in results])) for m in measures)} |"
        for given in results[0]
    ]
    newline = "\n"
    return f"""
## What x_t contributes

The denoiser of ours gets another x_t than the sampler's, {AUDIT_SAMPLES} samples. "noise" has x_t's variance and knows
nothing; at pure noise, the one step's only level, the input scaling is 0 and both are the same by construction. In the
last rows x_t is made once at t = 0.4 from the case's own reference, from that of another case, or is noise: if the
network reads x_t, the first must be better than the second, and by how much is what x_t can tell it.

| given to the denoiser | {" | ".join(measures.values())} |
|---|{"---|" * len(measures)}
{newline.join(lines)}
"""


def draw(found: dict[Run, dict[str, Any]], path: Path) -> None:
    """Sharp and right is below and on the left. Methods whose masks are all empty are left out."""
    points = {
        ROWS[method].title: tuple([mean([r["measures"][m] for r in results])] for m in ("nll", "crps"))
        for method, results in by_method(found).items()
        if mean([r["measures"]["dice"] for r in results])
    }
    draw_lines([Panel("Uncertainty", "NLL of voxels", "CRPS of volumes, relative", points)], path)


if __name__ == "__main__":
    main()
