"""The card of the shipped model: writes docs/hippocampus.md, and docs/worst.md with its picture.

    .venv/bin/python benchmarks/model_card.py --data FOLDER

FOLDER is Task04_Hippocampus of the Decathlon. Whatever replaces medseg_diff/models/hippocampus.safetensors is judged on
its validation cases and described anew.
"""

import argparse
import csv
import math
import subprocess
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.stats import binomtest
from worst_cases import ROOT, evaluated, write_worst

from medseg_diff.checkpoint import explain, shipped
from medseg_diff.console import outline
from medseg_diff.datasets.layouts import read_dataset, split

NAME = "hippocampus"
METRICS = {
    "dice": "Dice",
    "surface_dice_1mm": "surface Dice 1 mm",
    "hd95_mm": "HD95 mm",
    "volume_error_ml": "volume error ml",
}
RESAMPLES = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=ROOT / "runs/card")
    options = parser.parse_args()
    path, work = shipped()[NAME], options.work.resolve()
    summary = evaluated(str(path), options.data.resolve(), work)
    with (work / "cases.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    about = explain(path)
    data = about["config"]["data"]
    cases = [len(part) for part in split(read_dataset(options.data), data["folds"], data["fold"])]
    text = card(about, summary["mean"], rows, cases, path.stat().st_size)
    (ROOT / f"docs/{NAME}.md").write_text(text)
    write_worst(str(path), options.data, summary)
    print(text)


def bootstrap(values: Sequence[float], rng: np.random.Generator) -> tuple[float, float, float]:
    """The mean and its 95 % interval: percentiles of the means of RESAMPLES draws of as many values, with return."""
    drawn = rng.choice(np.array(values), (RESAMPLES, len(values))).mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(np.mean(values)), float(low), float(high)


def scores(rows: Sequence[dict[str, str]], mean: dict[str, Any]) -> list[str]:
    """Lines of the table: each label, and the mean over labels of each case."""
    cases: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for row in rows:
        cases[row["label"]][row["case"]] = {metric: float(row[metric] or math.nan) for metric in METRICS}
    lines = []
    for label in [*cases, "mean over labels"]:
        chosen = [cases[label]] if label in cases else list(cases.values())
        cells = []
        for metric in METRICS:
            by_case = [[found[case][metric] for found in chosen] for case in chosen[0]]
            values = [float(np.mean(numbers)) for numbers in by_case if not np.isnan(numbers).any()]
            few = f" of {len(values)} cases" if len(values) < len(by_case) else ""
            shown = "{:.3f} ({:.3f} to {:.3f})".format(*bootstrap(values, np.random.default_rng(0))) if values else "-"
            cells.append(shown + few)
        share, n = mean.get(f"coverage90/{label}"), len(chosen[0])
        if share is None:
            cells.append("")
        else:
            held = round(share * n)
            interval = binomtest(held, n).proportion_ci(method="wilson")
            cells.append(f"{held} of {n} ({interval.low:.0%} to {interval.high:.0%})")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def uncertainty(mean: dict[str, Any]) -> list[str]:
    """Lines of the measures of the uncertainty that are there."""
    measures: list[tuple[str, str, Callable[[float], str]]] = [
        ("nll", "NLL of a voxel, nats", "{:.4f}".format),
        ("brier", "Brier score of a voxel", "{:.4f}".format),
        ("ece", "calibration error, all voxels", "{:.2%}".format),
        ("ece_band", "calibration error within 3 voxels of a border", "{:.2%}".format),
        ("confident_errors", "wrong voxels of confidence 0.99 and more", "{:.1%}".format),
        ("error_auroc", "a wrong voxel is more uncertain than a right one", "{:.1%}".format),
        ("expected_dice_correlation", "rank correlation of the expected and the true Dice", "{:.2f}".format),
    ]
    return [f"| {text} | {show(mean[key])} |" for key, text, show in measures if mean.get(key) is not None]


def card(
    about: dict[str, Any], mean: dict[str, Any], rows: Sequence[dict[str, str]], cases: Sequence[int], size: int
) -> str:
    """The page, from the model's header, the summary and the cases of its evaluation; `cases` to train and validate."""
    config, trained, newline = about["config"], about["trained"], "\n"
    spent = "".join(f", {key} {value:g}" for key, value in trained.items() if isinstance(value, int | float))
    calibration = about.get("calibration")
    settings = {key: config[key] for key in ("data", "network", "diffusion", "train", "segment", "seed")}
    return f"""# The shipped model: {NAME}

`--model {NAME}` segments the anterior (1) and the posterior (2) hippocampus in T1 MRI **that is already cropped
around one hippocampus**. It draws {config["segment"]["samples"]} masks, reports one, and gives volumes with intervals.
One file of {size / 1e6:.1f} MB, digest {about["digest"][:12]}.

```
medseg-diff segment data/sample/imagesTr --model {NAME}
```

## What it is for, and what not

It is {config["use"] or "not said in its file what it is for"}.

- **No medical device.** Not for diagnosis, treatment or any decision about a patient.
- Not for whole heads: it was shown boxes of about 35 x 50 x 35 mm, and finds something in whatever it gets.
- Not for CT, T2 or FLAIR, other organs, children, a hippocampus that was operated on or a tumour: it saw none.
- Not for comparing groups of people without a check on scans of yours: its errors may differ between the groups.
- It does not notice that a scan is none of its kind. Its uncertainty speaks of borders, not of whether they make sense.

## Data

{cases[0]} cases to train on and {cases[1]} to validate of Task04_Hippocampus of the Medical Segmentation Decathlon:
one hippocampus each, 1 mm isotropic, from T1 MPRAGE of adults, healthy or with a non-affective psychotic disorder, of
one hospital (Vanderbilt University Medical Center), outlined by hand, one label map a case. CC BY-SA 4.0. Of the cases
sorted by name, every {config["data"]["folds"]}th validates. Antonelli et al. 2022, Nat. Commun. 13:4128; Simpson et al.
2019, arXiv:1902.09063.

## Training

Network `{config["network"]["kind"]}`{spent}. What decided it is in the file (`medseg-diff info {NAME}`):

```yaml
{yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=100).strip()}
```

## Scores

{cases[1]} validation cases, one mask each, seed 0. In brackets 95 % intervals over cases: bootstrap, {RESAMPLES}
resamples; Wilson for shares. Another training would differ by more than they say, and the best checkpoint was chosen
on these same cases.

| label | {" | ".join(METRICS.values())} | reference volume inside the interval |
|---|{"---|" * (len(METRICS) + 1)}
{newline.join(scores(rows, mean))}

## Uncertainty

Over all voxels of the validation cases.

| measure | value |
|---|---|
{newline.join(uncertainty(mean))}

{fitted(calibration)}

## Limits

The ten worst cases are [looked at one by one](worst.md). One hospital, one protocol: elsewhere expect less, and check.
Where the border between anterior and posterior lies is a convention of that protocol.

## Licence

The weights are given under [CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/), with attribution to the
data above: whether weights are an adaptation of their data is not settled, and this reading is the careful one. The
program is Apache-2.0.

Made by `.venv/bin/python benchmarks/model_card.py --data FOLDER` at {commit()}, medseg-diff {about["version"]}.
"""


def fitted(calibration: dict[str, Any] | str | None) -> str:
    """What the header says of the calibration after training, if there was any."""
    if not isinstance(calibration, dict):
        return "Nothing was calibrated after training: probabilities and intervals are as the network gives them."
    return f"""After training, temperature and intervals were fitted on these validation cases, and the figures above
flatter them. Those of `coverage` and `width` below do not: they are of cases left out of each fit.

```
{outline(calibration)}
```"""


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
