"""Training, top to bottom: `medseg-diff train`. The same command again goes on where it stopped."""

import copy
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from medseg_diff.checkpoint import FINISHED, Description, build, load_state, save_model, save_state
from medseg_diff.config import Config, flatten, parse_config, plain
from medseg_diff.console import progress, say
from medseg_diff.datasets.augment import augment, margin_size
from medseg_diff.datasets.cache import Volume, load_volumes
from medseg_diff.datasets.layouts import Case, Dataset, digest, read_dataset, split
from medseg_diff.datasets.pipeline import preprocessing
from medseg_diff.datasets.slices import draw_batch
from medseg_diff.device import autocast
from medseg_diff.diffusion.schedule import alpha_bar
from medseg_diff.errors import UserError
from medseg_diff.figures import draw_curves
from medseg_diff.files import owned, replacing
from medseg_diff.scans.geometry import ras_spacing
from medseg_diff.scans.read import read_scan
from medseg_diff.tracking import start_run
from medseg_diff.training.history import History
from medseg_diff.training.interrupt import Interrupt
from medseg_diff.training.objective import EnergyScore, conditional_loss, draw_levels, generation_loss, unet_loss
from medseg_diff.training.validation import validate

LOG_EVERY = 20
MOST_SKIPPED = 50
VALIDATION_BATCHES = 8
CURVES = ("train/loss", "val/loss", "val/dice")
BUDGET = (
    "train.steps",
    "train.max_minutes",
    "train.checkpoint_every",
    "tracking.uri",
    "tracking.experiment",
    "data.cache",
)
"""What may change between two calls of the same run."""


@dataclass
class State:
    """All that a run needs to go on; the random numbers of a step come from the seed and the step alone."""

    network: nn.Module
    average: nn.Module
    optimizer: torch.optim.Optimizer
    score: EnergyScore
    step: int = 0
    elapsed_s: float = 0.0
    validated: int = 0
    best: float = -float("inf")
    skipped: int = 0
    tracking_id: str | None = None

    def save(self, path: Path) -> None:
        """Writes it whole or not at all."""
        parts = {name: getattr(self, name).state_dict() for name in ("network", "average", "optimizer", "score")}
        counters = {name: value for name, value in vars(self).items() if name not in parts}
        save_state(path, {**parts, "counters": counters})

    def load(self, path: Path, device: torch.device) -> None:
        """Takes up what `save` wrote."""
        held = load_state(path, device)
        for name in ("network", "average", "optimizer", "score"):
            getattr(self, name).load_state_dict(held[name])
        for name, value in held["counters"].items():
            setattr(self, name, value)

    def spent(self, config: Config) -> float:
        """Share of the budget, in steps or minutes, whichever is further."""
        minutes = config.train.max_minutes
        return max(self.step / config.train.steps, self.elapsed_s / 60 / minutes if minutes else 0.0)


def train(config: Config, folder: Path, device: torch.device, *, fresh: bool = False) -> dict[str, Any]:
    """Trains into `folder` and returns the scores of the best model. Raises UserError."""
    dataset, training, validation = plan(config)
    with owned(folder):
        if fresh:
            _clear(folder)
        if (folder / FINISHED).exists():
            say(f"{folder} is finished already; --fresh starts again, --name trains beside it")
            return json.loads((folder / FINISHED).read_text())
        config = _settle(folder, config, training, len(dataset.channels))
        data, how = config.data, preprocessing(config.data)
        values = list(dataset.labels)
        with progress("preparing volumes", len(training) + len(validation)) as advance:
            prepared = load_volumes(
                [*training, *validation], how, values=values, channels=len(dataset.channels), folder=data.cache,
                progress=lambda _: advance(),
            )  # fmt: skip
        volumes, held_out = resident(prepared, device)[: len(training)], prepared[len(training) :]
        state = begin(config, len(dataset.channels), len(values), device)
        history = History(folder / "metrics.csv")
        if (folder / "state.pt").exists():
            state.load(folder / "state.pt", device)
            history.forget_after(state.step)
            say(f"resuming {folder} at step {state.step}")

        tags = {"dataset": dataset.name, "dataset_digest": digest(dataset), "task": config.task}
        tracker = start_run(
            config.tracking.uri,
            config.tracking.experiment,
            folder.name,
            flatten(plain(config)),
            tags,
            state.tracking_id,
        )
        state.tracking_id = tracker.run_id
        tracker.artifact(folder / "config.yaml")
        losses: list[float] = []
        with Interrupt() as interrupt, progress("training", 1.0) as advance:
            while (spent := state.spent(config)) < 1 or state.validated < config.train.validations:
                if spent >= (state.validated + 1) / config.train.validations:
                    state.save(folder / "state.pt")
                    with interrupt.at_once():
                        metrics = _validate(state, config, dataset, tags, folder, validation, held_out, device)
                    state.validated += 1
                    history.add(metrics, state.step)
                    history.save()
                    tracker.log(metrics, state.step)
                    draw_curves({name: history.curve(name) for name in CURVES}, folder / "curves.png")
                    say(
                        f"step {state.step}: "
                        + ", ".join(f"{name} {metrics[name]:.4f}" for name in CURVES if name in metrics)
                    )
                    continue
                begun = time.monotonic()
                _set_learning_rate(state.optimizer, config, spent)
                losses.append(_step(state, config, volumes, len(values), device))
                state.step += 1
                state.elapsed_s += time.monotonic() - begun
                if state.step % LOG_EVERY == 0:
                    found = {"train/loss": float(np.nanmean(losses)), "train/lr": state.optimizer.param_groups[0]["lr"]}
                    history.add(found, state.step)
                    tracker.log(found, state.step)
                    losses.clear()
                if interrupt.requested or state.step % config.train.checkpoint_every == 0:
                    state.save(folder / "state.pt")
                    history.save()
                if interrupt.requested:
                    tracker.finish(ok=False)
                    say(f"stopped at step {state.step}; the same command goes on from there")
                    raise SystemExit(128 + interrupt.requested)
                advance(state.spent(config) - spent, note=f"step {state.step}")

        state.save(folder / "state.pt")
        summary = {
            **history.last("val/"),
            "steps": state.step,
            "minutes": state.elapsed_s / 60,
            "skipped": state.skipped,
        }
        for path in [folder / "best.safetensors", *sorted(folder.glob("*.png")), folder / "metrics.csv"]:
            tracker.artifact(path)
        tracker.finish(ok=True)
        with replacing(folder / FINISHED) as temporary:
            temporary.write_text(json.dumps(summary, indent=2) + "\n")
        return summary


def _validate(
    state: State,
    config: Config,
    dataset: Dataset,
    tags: dict[str, str],
    folder: Path,
    cases: Sequence[Case],
    held_out: Sequence[Volume],
    device: torch.device,
) -> dict[str, float]:
    """Writes `model.safetensors`, judges it, writes its scores into it, and keeps the best as `best.safetensors`."""
    path = folder / "model.safetensors"
    about = Description(config, dataset.labels, dataset.channels, {}, tags, {"steps": state.step})
    weights = state.average.state_dict()
    save_model(path, weights, about)
    metrics = validate(path, device, cases, held_out, config.seed)
    state.score.eval()
    with torch.no_grad():
        seeds = [(config.seed, 2**40 + k) for k in range(VALIDATION_BATCHES)]
        classes = len(dataset.labels)
        losses = [loss_of(state.average, state.score, config, held_out, classes, device, seed) for seed in seeds]
    state.score.train()
    metrics["val/loss"] = float(torch.stack(losses).mean())
    save_model(path, weights, replace(about, scores=metrics))
    found = metrics["val/dice"] if "val/dice" in metrics else -metrics["val/loss"]
    if found > state.best:
        state.best = found
        with replacing(folder / "best.safetensors") as temporary:
            shutil.copyfile(path, temporary)
    return metrics


def plan(config: Config) -> tuple[Dataset, tuple[Case, ...], tuple[Case, ...]]:
    """The data set, and its cases for training and validation. Raises UserError."""
    dataset = read_dataset(config.data.root)
    training, validation = split(dataset, config.data.folds, config.data.fold)
    if config.task == "segment":
        unlabelled = [case.name for case in dataset.cases if not case.labels]
        if unlabelled:
            what = f"{len(unlabelled)} cases have no label map, the first is {unlabelled[0]}"
            raise UserError(config.data.root, what, "Label them, or move them out of 'training' in dataset.json.")
    return dataset, training, validation


def rehearse(config: Config, folder: Path, device: torch.device) -> str:
    """Checks what a run needs, up to one step on one case, and returns the resolved configuration as YAML."""
    dataset, training, validation = plan(config)
    channels, values = len(dataset.channels), list(dataset.labels)
    config = resolve(config, training, channels)
    if folder.exists():
        with owned(folder):
            pass
    for path in (case.image for case in (*training, *validation)):
        read_scan(path, channels)
    volumes = load_volumes(
        training[:1], preprocessing(config.data), values=values, channels=channels, folder=config.data.cache
    )
    state = begin(config, channels, len(values), device)
    _step(state, config, volumes, len(values), device)
    say(f"{len(training)} cases to train on, {len(validation)} to validate; one step went through")
    return yaml.safe_dump(plain(config), sort_keys=False)


def resolve(config: Config, training: Sequence[Case], channels: int) -> Config:
    """The configuration with the spacing filled in: the median over the training cases."""
    if config.data.spacing_mm is not None:
        return config
    found = []
    with progress("reading spacings", len(training)) as advance:
        for case in training:
            found.append(ras_spacing(read_scan(case.image, channels).affine))
            advance()
    median = tuple(round(float(length), 4) for length in np.median(found, axis=0))
    return config.model_copy(update={"data": config.data.model_copy(update={"spacing_mm": median})})


def begin(config: Config, channels: int, classes: int, device: torch.device) -> State:
    """A run at step 0."""
    network = build(config, channels, classes).to(device)
    settings = config.train
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=settings.lr, betas=(0.9, 0.99), weight_decay=settings.weight_decay
    )
    average = copy.deepcopy(network).requires_grad_(False)
    return State(network, average, optimizer, EnergyScore().to(device))


def resident(volumes: Sequence[Volume], device: torch.device) -> list[Volume]:
    """Volumes on the device where they take less than half of its memory; else where they are."""
    if device.type != "cuda":
        return list(volumes)
    size = sum(v.image.nbytes + v.labels.nbytes for v in volumes)
    if size > torch.cuda.mem_get_info(device)[0] / 2:
        return list(volumes)
    return [Volume(v.name, v.image.to(device), v.labels.to(device), v.centres) for v in volumes]


def loss_of(
    network: nn.Module,
    score: EnergyScore,
    config: Config,
    volumes: Sequence[Volume],
    classes: int,
    device: torch.device,
    seed: Sequence[int],
) -> Tensor:
    """The loss of one random batch, a function of the weights and `seed`."""
    data, diffusion = config.data, config.diffusion
    rng = np.random.default_rng(seed)
    generator = torch.Generator(device).manual_seed(int(rng.integers(2**62)))
    image, labels = draw_batch(
        volumes, rng, batch_size=config.train.batch_size, axis=data.axis,
        size=margin_size(data.size) if config.train.augment else data.size,
        neighbours=data.neighbours if config.task == "segment" else 0, foreground=data.foreground,
    )  # fmt: skip
    image, labels = image.to(device), labels.to(device).long()
    if config.train.augment:
        assert data.spacing_mm is not None
        spacing = data.spacing_mm if data.spatial_dims == 3 else tuple(np.delete(data.spacing_mm, data.axis).tolist())
        image, labels = augment(image, labels, data.size, spacing, generator)
    levels = draw_levels(len(image), diffusion.train_steps, diffusion.pure_noise, generator)
    abar = alpha_bar(diffusion.schedule, levels)
    with autocast(device, config.train.precision):
        match config.network.kind:
            case "conditional":
                return conditional_loss(
                    network, image, labels, abar, generator, classes=classes, scale=diffusion.scale,
                    draws=diffusion.draws, mean_weight=config.train.mean_weight, score=score,
                )  # fmt: skip
            case "unet":
                return unet_loss(network, image, labels, classes=classes)
            case "unconditional":
                return generation_loss(network, image, abar, generator)


def _step(state: State, config: Config, volumes: Sequence[Volume], classes: int, device: torch.device) -> float:
    """One optimizer step; one whose loss or gradient is not finite is skipped and counted."""
    state.optimizer.zero_grad(set_to_none=True)
    loss = loss_of(state.network, state.score, config, volumes, classes, device, (config.seed, state.step))
    loss.backward()
    norm = nn.utils.clip_grad_norm_(state.network.parameters(), config.train.clip)
    if not torch.isfinite(norm + loss.detach()):
        state.skipped += 1
        if state.skipped > MOST_SKIPPED:
            what = f"{state.skipped} steps had no finite loss, the last was step {state.step}"
            raise UserError("train", what, "Lower train.lr, or look for broken scans with medseg-diff check.")
        return float("nan")
    state.optimizer.step()
    decay = min(config.train.ema, (1 + state.step) / (10 + state.step))
    with torch.no_grad():
        torch._foreach_lerp_(list(state.average.parameters()), list(state.network.parameters()), 1 - decay)
    return float(loss.detach())


def _set_learning_rate(optimizer: torch.optim.Optimizer, config: Config, spent: float) -> None:
    """Linear warm-up, then a cosine to 0, both by the share of the budget."""
    warmup = config.train.warmup
    rise = min(1.0, (spent + 1e-3) / warmup) if warmup else 1.0
    fall = 0.5 * (1 + np.cos(np.pi * max(0.0, spent - warmup) / (1 - warmup))) if warmup < 1 else 1.0
    for group in optimizer.param_groups:
        group["lr"] = config.train.lr * rise * float(fall)


def _settle(folder: Path, config: Config, training: Sequence[Case], channels: int) -> Config:
    """The resolved configuration, written into the run or found there; a run goes on only as it began."""
    path = folder / "config.yaml"
    if not path.exists():
        config = resolve(config, training, channels)
        with replacing(path) as temporary:
            temporary.write_text(yaml.safe_dump(plain(config), sort_keys=False))
        return config
    began = parse_config(yaml.safe_load(path.read_text()), path)
    if config.data.spacing_mm is None:
        config = config.model_copy(
            update={"data": config.data.model_copy(update={"spacing_mm": began.data.spacing_mm})}
        )
    old, new = flatten(plain(began)), flatten(plain(config))
    changed = [f"{key}: {old[key]} -> {new[key]}" for key in old if old[key] != new[key] and key not in BUDGET]
    if changed:
        what = f"the run began with another configuration ({'; '.join(changed)})"
        raise UserError(folder, what, "Train under another --name, or start again with --fresh.")
    return config


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != ".lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
