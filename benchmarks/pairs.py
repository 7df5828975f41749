"""What synthetic pairs are worth: a U-Net trained on them alone, and one trained on as many real slices.

    .venv/bin/python benchmarks/pairs.py --model RUN --data FOLDER

RUN comes from `medseg-diff train --config configs/generate_pairs.yaml`. Both are judged on the real validation cases.
Writes docs/pairs.md.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from medseg_diff.checkpoint import Model, load_model
from medseg_diff.datasets.layouts import read_dataset
from medseg_diff.realism.images import draw_crops, load_split

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--work", type=Path, default=ROOT / "runs/pairs")
    options = parser.parse_args()
    work, data = options.work.resolve(), options.data.resolve()
    work.mkdir(parents=True, exist_ok=True)
    model = load_model(options.model / "best.safetensors", torch.device("cpu"))
    synthetic, real = work / "synthetic", work / "real"
    program("generate", "--model", options.model.resolve(), "--count", options.count, "--out", synthetic, work=work)
    program("evaluate", "--generated", synthetic, "--reference", data, "--out", work / "realism", work=work)
    write_real(model, real, data, options.count)
    size = list(model.about.config.data.size)
    folders = {"real": real, "synthetic": synthetic}
    rows = {name: score(name, folder, data, size, options.minutes, work) for name, folder in folders.items()}
    text = page(rows, json.loads((work / "realism/summary.json").read_text())["mean"], options)
    (ROOT / "docs/pairs.md").write_text(text)
    print(text)


def program(*arguments: object, work: Path) -> None:
    subprocess.run([sys.executable, "-m", "medseg_diff", *map(str, arguments)], cwd=work, check=True)


def write_real(model: Model, folder: Path, data: Path, count: int) -> None:
    """Slices of the training cases, cut and written as the synthetic ones are."""
    dataset, settings = read_dataset(data), model.about.config.data
    training, _ = load_split(dataset, settings, labelled=True)
    images, labels = draw_crops(training, settings, count, (0, 3))
    values, names = np.array(list(dataset.labels)), [f"image_{index:04d}" for index in range(count)]
    shutil.rmtree(folder, ignore_errors=True)
    for part, arrays in (("imagesTr", images[:, 0].numpy()), ("labelsTr", values[labels.numpy()].astype(np.uint8))):
        (folder / part).mkdir(parents=True)
        for name, array in zip(names, arrays, strict=True):
            volume = np.expand_dims(array, settings.axis)
            nib.save(nib.Nifti1Image(volume, np.diag([*settings.spacing_mm, 1.0])), folder / part / f"{name}.nii.gz")
    description = {
        "name": "real",
        "modality": {"0": dataset.channels[0]},
        "labels": {str(value): name for value, name in dataset.labels.items()},
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names],
    }
    (folder / "dataset.json").write_text(json.dumps(description))


def score(name: str, folder: Path, data: Path, size: list[int], minutes: float, work: Path) -> dict[str, float]:
    """Scores, on the validation cases of `data`, of a U-Net that saw the slices of `folder` only."""
    settings = ["network.kind=unet", "data.neighbours=0", f"data.size={size}", f"data.root={folder}"]
    settings += [f"train.max_minutes={minutes}", "train.validations=1"]
    words = [word for setting in settings for word in ("--set", setting)]
    program("train", "--config", ROOT / "configs/hippocampus_slices.yaml", "--name", name, "--fresh", *words, work=work)
    out = work / f"evaluation_{name}"
    program("evaluate", "--model", f"runs/{name}", "--data", data, "--out", out, work=work)
    return json.loads((out / "summary.json").read_text())["mean"]


def page(rows: dict[str, dict[str, float]], realism: dict[str, float], options: argparse.Namespace) -> str:
    names = [key for key in rows["real"] if key == "dice" or key.startswith("dice/")]
    lines = [
        f"| {options.count} {name} slices | " + " | ".join(f"{scores[key]:.3f}" for key in names) + " |"
        for name, scores in rows.items()
    ]
    measures = [
        f"| {key} | {value:.3f} | {realism[other]:.3f} |"
        for key, value in realism.items()
        if value is not None
        for other in (f"{key}_floor", f"{key}_reference")
        if realism.get(other) is not None
    ]
    newline = "\n"
    return f"""# Synthetic pairs

A 2D U-Net (Dice + cross-entropy) trained on slices with masks that were drawn from noise alone, and one trained on as
many real slices of the training cases, {options.minutes:g} minutes each; Dice on the 40 real validation cases. Both
sets are normalized slice by slice in training and the cases as volumes, which costs both of them accuracy.

| trained on | {" | ".join(names)} |
|---|{"---|" * len(names)}
{newline.join(lines)}

The synthetic images, measured (`medseg-diff evaluate --generated`):

| measure | generated | training or held-out images |
|---|---|---|
{newline.join(measures)}

Made by `.venv/bin/python benchmarks/pairs.py --model RUN --data FOLDER`; RUN is from `configs/generate_pairs.yaml`.
"""


if __name__ == "__main__":
    main()
