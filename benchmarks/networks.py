"""Networks on the same data at equal CPU time: Dice, seconds a volume, parameters. Writes docs/networks.md.

    .venv/bin/python benchmarks/networks.py --data FOLDER

FOLDER is Task04_Hippocampus of the Decathlon. Each network trains in a process of its own on one thread, two at a time.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
OUR_WAY = (
    "diffusion.prediction=x0", "diffusion.schedule=cosine", "diffusion.zero_terminal=true", "diffusion.scale=0.2",
    "diffusion.pure_noise=0.1", "segment.sampler=ddpm",
)  # fmt: skip
FEW = ("segment.samples=5", "segment.steps=10")


@dataclass(frozen=True)
class Row:
    """A run: what the table calls it, its configuration, what differs from it."""

    name: str
    title: str
    config: str
    settings: tuple[str, ...] = ()


ROWS = (
    Row("unet", "deterministic U-Net, Dice + cross-entropy", "hippocampus_slices", ("network.kind=unet",)),
    Row("conditional", "conditional (ours): 16 samples, 1 step", "hippocampus_slices"),
    Row("classic", "classic U-Net denoiser, x0: 8 samples, 8 steps", "classic_unet"),
    Row("v1", "MedSegDiff V1, as the paper (noise): 5 samples, 10 steps, STAPLE", "medsegdiff_v1", FEW),
    Row("v2", "MedSegDiff V2, as the paper (noise): 5 samples, 10 steps", "medsegdiff_v2", FEW),
    Row("v1_x0", "V1, predicting x0, cosine, b = 0.2: 5 samples, 10 steps", "medsegdiff_v1", (*FEW, *OUR_WAY)),
    Row("v2_x0", "V2, predicting x0, cosine, b = 0.2: 5 samples, 10 steps", "medsegdiff_v2", (*FEW, *OUR_WAY)),
)
"""With 50 steps and 25 samples, the paper's, V1 would take 25 times as long for a volume."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--work", type=Path, default=ROOT / "runs/networks")
    parser.add_argument("--rows", nargs="*", default=[row.name for row in ROWS])
    options = parser.parse_args()
    work, data = options.work.resolve(), options.data.resolve()
    work.mkdir(parents=True, exist_ok=True)
    chosen, revision = [row for row in ROWS if row.name in options.rows], commit()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda row: train(row, work, data, options.minutes), chosen))
    scans = sorted((data / "imagesTr").glob("*.nii.gz"))[:15:5]
    lines = [describe(row, work, scans) for row in ROWS if (work / "runs" / row.name / "summary.json").exists()]
    text = page(lines, options.minutes, revision)
    (ROOT / "docs/networks.md").write_text(text)
    print(text)


def run(arguments: list[str], work: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "medseg_diff", *arguments], cwd=work, env=environment, check=True)


def train(row: Row, work: Path, data: Path, minutes: float) -> None:
    settings = [*row.settings, f"data.root={data}", f"train.max_minutes={minutes}", "train.validations=1"]
    arguments = ["train", "--config", str(ROOT / f"configs/{row.config}.yaml"), "--name", row.name]
    run([*arguments, *(word for setting in settings for word in ("--set", setting))], work)


def describe(row: Row, work: Path, scans: list[Path]) -> str:
    """A line of the table; the volumes are segmented one after another, while nothing else runs."""
    folder = work / "runs" / row.name
    out = work / "segmentations" / row.name
    run(["segment", *map(str, scans), "--model", str(folder), "--out", str(out), "--save", "report"], work)
    seconds = median(json.loads(path.read_text())["seconds"] for path in out.glob("*.json"))
    scores = json.loads((folder / "summary.json").read_text())
    millions = sum(tensor.numel() for tensor in load_file(folder / "best.safetensors").values()) / 1e6
    dice, hd95 = (scores[f"val/{name}"] for name in ("dice", "hd95_mm"))
    return f"| {row.title} | {millions:.2f} M | {scores['steps']} | {dice:.3f} | {hd95:.2f} | {seconds:.2f} |"


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def page(lines: list[str], minutes: float, revision: str) -> str:
    return f"""# Networks at equal time

Task04_Hippocampus, 160 cases to train on, 40 to validate, sagittal slices with their neighbours, {minutes:g} minutes of
training on one thread each (two networks at a time on two cores), seed 0. HD95 in mm; seconds for one volume on one
thread, all of `segment` but for loading the model. One seed: differences under 0.005 Dice are ties.

| network | parameters | steps | mean Dice | HD95 | seconds a volume |
|---|---|---|---|---|---|
{chr(10).join(lines)}

Made by `.venv/bin/python benchmarks/networks.py --data FOLDER` at {revision}, torch {torch.__version__},
{processor()}.
"""


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())


if __name__ == "__main__":
    main()
