"""Dice at equal CPU time: ours, our U-Net, nnU-Net in 2D and 3D. Writes docs/accuracy.md and its figure.

    .venv/bin/python benchmarks/accuracy.py --data FOLDER
    .venv/bin/python benchmarks/accuracy.py --data FOLDER --labelled 10

FOLDER is Task04_Hippocampus of the Decathlon. Runs that are under --work already are not repeated.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from comparators.judge import bootstrap, differences, mean, per_case
from comparators.protocol import ROOT, Run, ensure, finished, origin

from medseg_diff.figures import Panel, draw_lines

TITLES = {
    "conditional": "ours",
    "unet": "our U-Net (Dice + cross-entropy)",
    "nnunet_2d": "nnU-Net 2D",
    "nnunet_3d": "nnU-Net 3D",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=ROOT / "runs/benchmark")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    parser.add_argument("--config", default="hippocampus")
    parser.add_argument("--minutes", type=float, default=7.0, help="CPU minutes of a training")
    parser.add_argument("--seeds", type=int, default=3, help="of ours and of our U-Net; nnU-Net draws its own, once")
    parser.add_argument("--methods", nargs="*", default=list(TITLES), choices=list(TITLES))
    parser.add_argument("--labelled", type=int, help="train on the first so many cases alone")
    parser.add_argument("--cases", type=int, help="judge the first so many cases alone")
    parser.add_argument("--table", action="store_true", help="make the table of the runs that are there")
    options = parser.parse_args()
    options.work, options.data = options.work.resolve(), options.data.resolve()
    for folder in (options.work, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    runs = [
        Run(method, options.config, seed, options.minutes, options.data, options.work, options.labelled, options.cases)
        for seed in range(options.seeds)
        for method in options.methods
        if seed == 0 or not method.startswith("nnunet")
    ]
    if not options.table:
        ensure(runs)
    found = finished(runs)
    name = f"accuracy_labelled{options.labelled}" if options.labelled else "accuracy"
    text = page(found, options, name)
    (options.out / f"{name}.md").write_text(text)
    draw(found, options.out / f"{name}.png")
    print(text)


def by_method(found: dict[Run, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {
        method: [r for run, r in found.items() if run.method == method]
        for method in TITLES
        if any(run.method == method for run in found)
    }


def page(found: dict[Run, dict[str, Any]], options: argparse.Namespace, name: str) -> str:
    methods = by_method(found)
    any_result = next(iter(found.values()))
    labels = [key.split("/")[1] for key in any_result["measures"] if key.startswith("dice/")]
    lines = []
    for method, results in methods.items():
        numbers = [
            f"{mean([r['measures'][key] for r in results]):.4f}" for key in ("dice", *(f"dice/{x}" for x in labels))
        ]
        spread = np.std([r["measures"]["dice"] for r in results], ddof=1) if len(results) > 1 else float("nan")
        numbers[0] += f" ± {spread:.4f}" if len(results) > 1 else ""
        hd95 = mean([r["measures"]["hd95_mm"] for r in results])
        steps = mean([float(r["training"]["steps"]) for r in results])
        seconds = mean([r["seconds_a_volume"] for r in results])
        lines.append(
            f"| {TITLES[method]} | {len(results)} | {steps:.0f} | "
            + " | ".join(numbers)
            + f" | {'-' if np.isnan(hd95) else f'{hd95:.2f}'} | {seconds:.2f} |"
        )
    against = []
    for other in (method for method in methods if method != "conditional"):
        if "conditional" not in methods:
            break
        for measure, unit in (("dice", ""), ("hd95_mm", " mm")):
            apart = differences(methods["conditional"], methods[other], measure)
            if np.isnan(apart).all():  # HD95 of masks that are all empty
                continue
            low, high = bootstrap(apart)
            against.append(
                f"| ours - {TITLES[other]} | {measure} | {len(apart)} | {np.nanmean(apart):+.4f}{unit} "
                f"| {low:+.4f} to {high:+.4f} |"
            )
    few = f", of which the first {options.labelled} cases are labelled" if options.labelled else ""
    extra = f" --labelled {options.labelled}" if options.labelled else ""
    newline = "\n"
    return f"""# Dice at equal CPU time

Task04_Hippocampus, cases i with i % 5 != 0 to train on{few}, the other {len(any_result["cases"])} to judge;
`configs/{options.config}.yaml`, {options.minutes:g} CPU minutes of training each on one thread (process time, the
loading of data included). Ours reports its mean head. nnU-Net is its own trainer, plans, augmentation and prediction
with mirroring; its learning rate falls to 0 over the same CPU time, and it computes in fp32 where ours takes bf16 on
processors that are fast in it. In this time it takes fewer than 40 steps of its large batches, and its masks are
empty still: that tells how long it needs, not how good it gets (.890 in 3D as published, after 250,000 steps).
HD95 in mm. CPU seconds for a volume: ours with its 64 samples.

| network | seeds | steps | Dice | {" | ".join(f"Dice {label}" for label in labels)} | HD95 | seconds a volume |
|---|---|---|---|{"---|" * len(labels)}---|---|
{newline.join(lines)}

Paired differences; 95 % interval by a bootstrap over seeds and cases, each drawn as a whole.

| | measure | seeds | mean | 95 % interval |
|---|---|---|---|---|
{newline.join(against)}

![Dice of every case]({name}.png)

Made by `.venv/bin/python benchmarks/accuracy.py --data FOLDER{extra}`; seeds 0 to {options.seeds - 1};
{origin(found)}.
"""


def draw(found: dict[Run, dict[str, Any]], path: Path) -> None:
    """Cases sorted by Dice, the mean over seeds: where methods differ, in the easy cases or in the hard ones.

    Methods whose masks are all empty are left out.
    """
    curves = {}
    for method, results in by_method(found).items():
        of_cases = np.mean([list(per_case(r, "dice").values()) for r in results], axis=0)
        if of_cases.any():
            curves[TITLES[method]] = (list(range(1, len(of_cases) + 1)), sorted(of_cases.tolist()))
    draw_lines([Panel("Dice of every case", "cases, the worst first", "Dice", curves)], path)


if __name__ == "__main__":
    main()
