"""Quality against the number of steps, for every sampler, on masks and on images. Writes docs/steps.md and its figure.

    .venv/bin/python benchmarks/steps.py --masks runs/networks/runs/classic --images runs/generate_pairs --data FOLDER

Models are run folders: `benchmarks/networks.py` leaves the one, `train --config configs/generate_pairs.yaml` the other.
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from medseg_diff.checkpoint import Model, load_model
from medseg_diff.console import say
from medseg_diff.datasets.layouts import Case, read_dataset, split
from medseg_diff.denoising import resampled
from medseg_diff.diffusion.sampler import METHODS
from medseg_diff.evaluate import evaluate_model
from medseg_diff.figures import Panel, draw_lines
from medseg_diff.generate import generate_images
from medseg_diff.realism.features import features, train_extractor
from medseg_diff.realism.images import draw_crops, load_split
from medseg_diff.realism.measures import frechet_distance

ROOT = Path(__file__).resolve().parents[1]
STEPS = (1, 2, 4, 8, 16, 32, 50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=3)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--count", type=int, default=100)
    options = parser.parse_args()
    cpu = torch.device("cpu")
    denoiser = load_model(options.masks / "best.safetensors", cpu)
    generator = load_model(options.images / "best.safetensors", cpu)
    data = denoiser.about.config.data
    _, cases = split(read_dataset(options.data), data.folds, data.fold)
    cases = cases[:: max(1, len(cases) // options.cases)][: options.cases]
    distance, floor = distance_to(options.data, generator, options.count)
    found = {name: {method: [] for method in METHODS} for name in ("mask", "agreement", "image")}
    for method in METHODS:
        for steps in STEPS:
            dice, agreement = masks(resampled(denoiser, sampler=method), cases, steps, options.samples)
            images = generate_images(resampled(generator, sampler=method), options.count, steps=steps, seed=0)
            scores = dice, agreement, distance(images[:, : len(generator.about.channels)])
            for name, value in zip(found, scores, strict=True):
                found[name][method].append(value)
            say(f"{method}, {steps} steps: " + ", ".join(f"{name} {found[name][method][-1]:.3f}" for name in found))
    write(found, floor, options)


def masks(model: Model, cases: Sequence[Case], steps: int, samples: int) -> tuple[float, float]:
    """Mean Dice of the fused mask, and mean Dice between two samples."""
    mean = evaluate_model(model, cases, samples=samples, steps=steps)["mean"]
    agreements = [value for name, value in mean.items() if name.startswith("agreement/")]
    return mean["dice"], float(np.mean(agreements))


def distance_to(root: Path, model: Model, count: int) -> tuple[Callable[[torch.Tensor], float], float]:
    """The Frechet distance to as many held-out images, with features learned once; and that of training images."""
    data = model.about.config.data
    training, held_out = load_split(read_dataset(root), data, labelled=False)
    extractor = train_extractor(lambda n, step: draw_crops(training, data, n, (0, 2, step))[0], 0)
    real = features(extractor, draw_crops(held_out, data, count, (0, 0))[0])

    def distance(images: torch.Tensor) -> float:
        return frechet_distance(features(extractor, images), real)

    return distance, distance(draw_crops(training, data, count, (0, 1))[0])


def write(found: dict[str, dict[str, list[float]]], floor: float, options: argparse.Namespace) -> None:
    def curves(name: str) -> dict[str, tuple[list[int], list[float]]]:
        return {method: (list(STEPS), values) for method, values in found[name].items()}

    panels = [
        Panel("masks: Dice of the fused samples", "steps", "mean Dice", curves("mask"), log="x"),
        Panel("masks: Dice between two samples", "steps", "mean Dice", curves("agreement"), log="x"),
        Panel(
            "images: Fréchet distance",
            "steps",
            "distance to held-out images",
            {**curves("image"), "training images": (list(STEPS), [floor] * len(STEPS))},
            log="xy",
        ),
    ]
    draw_lines(panels, ROOT / "docs/steps.png")
    head = "| sampler | " + " | ".join(map(str, STEPS)) + " |\n|---|" + "---|" * len(STEPS)
    titles = {
        "mask": f"Mean Dice of {options.samples} fused samples, {options.cases} validation cases",
        "agreement": "Mean Dice between two samples of a case",
        "image": f"Fréchet distance of {options.count} images to held-out ones ({floor:.1f} for training images)",
    }
    digits = {"mask": 3, "agreement": 3, "image": 1}
    tables = [
        f"## {titles[name]}\n\n{head}\n"
        + "\n".join(
            f"| {method} | " + " | ".join(f"{value:.{digits[name]}f}" for value in values) + " |"
            for method, values in rows.items()
        )
        for name, rows in found.items()
    ]
    text = "# Steps against quality\n\n![Quality against steps](steps.png)\n\n" + "\n\n".join(tables)
    text += (
        "\n\nMasks by the classic U-Net of [networks.md](networks.md), images by `configs/generate_pairs.yaml`."
        " A step calls the network once, with heun twice but for the first and the last step. Made by\n"
        "`.venv/bin/python benchmarks/steps.py --masks RUN --images RUN --data FOLDER`.\n"
    )
    (ROOT / "docs/steps.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
