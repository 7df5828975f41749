"""The same for every comparator: data, crops, optimizer, CPU time, a process of its own, results that are kept."""

import copy
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medseg_diff.checkpoint import Description, Model
from medseg_diff.config import Config
from medseg_diff.config_file import load_config
from medseg_diff.datasets.cache import Volume, load_volumes
from medseg_diff.datasets.layouts import Dataset, read_dataset, split
from medseg_diff.datasets.pipeline import outside, preprocessing
from medseg_diff.datasets.slices import cut, with_neighbours
from medseg_diff.device import autocast
from medseg_diff.training.batch import draw_step
from medseg_diff.training.step import AUGMENTED, set_learning_rate
from medseg_diff.windows import pad_to_stride

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")

Prediction = tuple[np.ndarray, np.ndarray | None]
"""Probabilities [classes, x, y, z], and samples [n, x, y, z] of class indices, None where there are none."""


@dataclass(frozen=True)
class Run:
    """A training and its scores. `labelled` are the first training cases that count, `cases` those that are judged."""

    method: str
    config: str
    seed: int
    minutes: float
    data: Path
    work: Path
    labelled: int | None = None
    cases: int | None = None
    samples: int = 64

    @property
    def trained(self) -> str:
        """Names what was learned."""
        few = f"-labelled{self.labelled}" if self.labelled else ""
        return f"{self.method}-{self.config}-{self.minutes:g}min{few}-seed{self.seed}"

    @property
    def path(self) -> Path:
        """Where the scores are kept."""
        few = f"-cases{self.cases}" if self.cases else ""
        return self.work / f"{self.trained}-n{self.samples}{few}.json"


def configuration(run: Run, settings: Sequence[str] = ()) -> Config:
    own = [f"data.root={run.data}", f"data.cache={run.work / 'cache'}", f"seed={run.seed}"]
    return load_config(ROOT / f"configs/{run.config}.yaml", [*own, *settings])


def volumes_of(run: Run, config: Config) -> tuple[Dataset, list[Volume], list[Volume]]:
    """The data set, what is trained on and what is judged."""
    dataset = read_dataset(run.data)
    training, validation = split(dataset, config.data.folds, config.data.fold)
    loaded = [
        load_volumes(
            cases,
            preprocessing(config.data),
            values=list(dataset.labels),
            channels=len(dataset.channels),
            folder=config.data.cache,
        )
        for cases in (training[: run.labelled], validation[: run.cases])
    ]
    return dataset, *loaded


def model_of(network: nn.Module, config: Config, dataset: Dataset) -> Model:
    about = Description(config, dataset.labels, dataset.channels, {}, {}, {})
    return Model(network.eval().requires_grad_(False), about, Path("in memory"), "", CPU)


def timed(config: Config, cpu_seconds: float) -> Config:
    """The configuration with this budget, of which `take_step` asks how much is spent."""
    return config.model_copy(update={"train": config.train.model_copy(update={"max_minutes": cpu_seconds / 60})})


def within(
    cpu_seconds: float, config: Config, optimizer: torch.optim.Optimizer, step: Callable[[int, float], object]
) -> int:
    """Steps until the CPU time of this process is spent, under train's own course of the learning rate.

    A step is told how many were before it, and the share of the budget that is spent.
    """
    begun, count = time.process_time(), 0
    while (spent := (time.process_time() - begun) / cpu_seconds) < 1:
        set_learning_rate(optimizer, config.train.lr, config.train.warmup, spent)
        step(count, spent)
        count += 1
    return count


def fit(
    network: nn.Module,
    loss: Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor],
    volumes: Sequence[Volume],
    config: Config,
    classes: int,
    cpu_seconds: float,
) -> tuple[nn.Module, int]:
    """Trains a network by a loss of its own as train trains ours; the moving average of the weights, and the steps.

    The loss gets crops [batch, channels, *space] and their class indices [batch, *space].
    """
    train = config.train
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=train.lr, betas=(0.9, 0.99), weight_decay=train.weight_decay, fused=True
    )

    def step(count: int, spent: float) -> None:
        augmented = train.augment and spent < AUGMENTED
        batch = draw_step(config, volumes, classes, (config.seed, count), CPU, augmented)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + count)
        optimizer.zero_grad(set_to_none=True)
        with autocast(CPU, train.precision):
            found = loss(network, batch.image, batch.labels, generator)
        found.backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), train.clip)
        if torch.isfinite(norm + found.detach()):
            optimizer.step()
            decay = min(train.ema, (1 + count) / (10 + count))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)

    return average, within(cpu_seconds, config, optimizer, step)


@torch.inference_mode()
def over_volume(network: Callable[[Tensor], Tensor], config: Config, image: Tensor) -> Tensor:
    """Outputs [channels, x, y, z] of a network over a whole scan [channels, x, y, z], padded as inference pads it."""
    data = config.data
    flat = data.spatial_dims == 2
    batch = with_neighbours(image.movedim(data.axis + 1, 1), data.neighbours) if flat else image[None]
    space = tuple(batch.shape[2:])
    padded = cut(batch, (0,) * len(space), pad_to_stride(space, config.network.widths), outside(data.modality))
    with autocast(CPU, config.train.precision):
        output = cut(network(padded).float(), (0,) * len(space), space)
    return output.transpose(0, 1).movedim(1, data.axis + 1) if flat else output[0]


def ensure(runs: Sequence[Run]) -> None:
    """Makes the results that are not there, each in a process of its own on one thread, two at a time."""
    missing = [run for run in runs if not run.path.exists()]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_start, missing))


def _start(run: Run) -> None:
    paths = [str(ROOT / "benchmarks"), str(ROOT)]
    if run.method == "monai_ddpm":
        extras = ROOT / "runs/monai"  # MONAI's attention wants einops, which nothing of ours does
        if not extras.exists():
            install = ["pip", "install", "-q", "--no-deps", "--target", str(extras), "einops"]
            subprocess.run([sys.executable, "-m", *install], check=True)
        paths.append(str(extras))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    description = json.dumps(asdict(run), default=str)
    subprocess.run([sys.executable, "-m", "comparators", description], cwd=run.work, env=environment, check=True)


def finished(runs: Sequence[Run]) -> dict[Run, dict[str, Any]]:
    """The results that are there; what JSON has as null is nan."""
    return {run: _undefined(json.loads(run.path.read_text())) for run in runs if run.path.exists()}


def _undefined(found: Any) -> Any:
    match found:
        case dict():
            return {key: _undefined(value) for key, value in found.items()}
        case list():
            return [_undefined(value) for value in found]
        case None:
            return float("nan")
    return found


def origin(found: dict[Run, dict[str, Any]]) -> str:
    """Commits, versions and machines of results, for the foot of a table."""
    made = {key: ", ".join(sorted({r[key] for r in found.values()})) for key in ("commit", "torch", "machine")}
    return f"commit {made['commit']}, torch {made['torch']}, {made['machine']}"


def circumstances() -> dict[str, str]:
    """Commit, processor and versions, as every result states them."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    return {"commit": commit, "machine": f"{name}, one thread", "torch": torch.__version__}
