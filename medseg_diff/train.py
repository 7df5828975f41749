"""Training, top to bottom: `medseg-diff train`. The same command again goes on where it stopped."""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from medseg_diff.checkpoint import FINISHED, Description, describe, load_model, save_model
from medseg_diff.config import Config, flatten, plain
from medseg_diff.console import progress, say
from medseg_diff.datasets.cache import Volume, load_volumes
from medseg_diff.datasets.description import first
from medseg_diff.datasets.layouts import Case, Dataset, digest, file_digest, read_dataset, split, twins
from medseg_diff.datasets.pipeline import preprocessing
from medseg_diff.denoising import path_of
from medseg_diff.errors import UserError
from medseg_diff.figures import draw_curves
from medseg_diff.files import owned, replacing
from medseg_diff.tracking import Tracker, start_run
from medseg_diff.training.history import History
from medseg_diff.training.interrupt import Interrupt
from medseg_diff.training.settings import resolve, same_run, settle, without_paths
from medseg_diff.training.state import State, begin
from medseg_diff.training.step import held_out_loss, take_step
from medseg_diff.training.validation import validate

LOG_EVERY = 20
VALIDATION_BATCHES = 8
CURVES = ("train/loss", "val/loss", "val/dice")


def train(config: Config, folder: Path, device: torch.device, *, fresh: bool = False) -> dict[str, Any]:
    """Trains into `folder` and returns the scores of the best model. Raises UserError."""
    dataset, training, validation = plan(config)
    with owned(folder):
        if fresh:
            _clear(folder)
        config = settle(folder, config, training, len(dataset.channels))
        if (folder / FINISHED).exists():
            say(f"{folder} is finished already; --fresh starts again, --name trains beside it")
            return json.loads((folder / FINISHED).read_text())
        budget, values = config.train, list(dataset.labels)
        volumes = _prepared((*training, *validation), config, values, len(dataset.channels))
        held_out, volumes = volumes[len(training) :], _resident(volumes[: len(training)], device)
        state = begin(config, len(dataset.channels), len(values), device, volumes)
        history = History(folder / "metrics.csv")
        tags = {"task": config.task, "dataset": dataset.name, "dataset_digest": digest(dataset)}
        if (folder / "state.pt").exists():
            state.load(folder / "state.pt", device)
            if state.dataset_digest != tags["dataset_digest"]:
                advice = (
                    "Bring the data set back to what it was, train under another --name, or start again with --fresh."
                )
                raise UserError(config.data.root, f"the data set changed since {folder} began", advice)
            state.extend(budget)
            history.forget_after(state.step)
            say(f"going on with {folder} at step {state.step}")

        tracking = config.tracking
        parameters = flatten(plain(without_paths(config)))
        tracker = start_run(tracking.uri, tracking.experiment, folder.name, parameters, tags, state.tracking_id)
        tracker.text("config.yaml", yaml.safe_dump(plain(without_paths(config)), sort_keys=False))
        state.tracking_id, state.dataset_digest = tracker.run_id, tags["dataset_digest"]
        state.save(folder / "state.pt")

        with _finishing(tracker), Interrupt() as interrupt, progress("training", 1.0) as advance:
            while not (_done(state, config) and state.validated_step == state.step):
                spent = state.spent(budget)
                due = state.validated < budget.validations and spent >= (state.validated + 1) / budget.validations
                if due or _done(state, config):
                    state.save(folder / "state.pt")
                    with interrupt.at_once():
                        found = _validate(state, config, dataset, tags, folder, validation, held_out, device)
                    state.validated_step = state.step
                    state.validated = max(state.validated + 1, min(int(spent * budget.validations), budget.validations))
                    history.add(found, state.step)
                    history.save()
                    tracker.log(found, state.step)
                    draw_curves({name: history.curve(name) for name in CURVES}, folder / "curves.png")
                    shown = ", ".join(f"{name} {found[name]:.4f}" for name in CURVES if name in found)
                    say(f"step {state.step}: {shown}")
                    continue
                if _mean_head_done(state, config):
                    say(f"step {state.step}: the mean head is done, the denoiser begins")
                    over = state.impatient(budget)
                    state.teach_denoiser(load_model(folder / "best.safetensors", device).network if over else None)
                    continue
                begun = time.monotonic()
                state.recent.append(take_step(state, config, volumes, len(values)))
                state.step += 1
                state.elapsed_s += time.monotonic() - begun
                if state.step % LOG_EVERY == 0:
                    found = {
                        "train/loss": float(np.nanmean(state.recent)),
                        "train/lr": state.optimizer.param_groups[0]["lr"],
                    }
                    history.add(found, state.step)
                    tracker.log(found, state.step)
                    state.recent.clear()
                if interrupt.requested or state.step % budget.checkpoint_every == 0:
                    state.save(folder / "state.pt")
                    history.save()
                if interrupt.requested:
                    say(f"stopped at step {state.step}; the same command goes on from there")
                    raise SystemExit(128 + interrupt.requested)
                advance(state.spent(budget) - spent, note=f"step {state.step}")

        if state.spent(budget) < 1:
            say(f"stopped early at step {state.step}: {state.stale} validations in a row were no better than the best")
        state.save(folder / "state.pt")
        spent_on = {"steps": state.step, "minutes": state.elapsed_s / 60, "skipped": state.skipped}
        summary = {**describe(folder / "best.safetensors")[0].scores, **spent_on}
        for path in [folder / "best.safetensors", folder / "metrics.csv", *sorted(folder.glob("*.png"))]:
            tracker.artifact(path)
        tracker.finish(ok=True)
        with replacing(folder / FINISHED) as temporary:
            temporary.write_text(json.dumps(summary, indent=2) + "\n")
        return summary


def rehearse(config: Config, folder: Path, device: torch.device) -> str:
    """Checks all that a run needs, up to one step on one case; returns the resolved configuration as YAML."""
    dataset, training, validation = plan(config)
    channels, values = len(dataset.channels), list(dataset.labels)
    if folder.exists():
        with owned(folder):
            pass
    config = same_run(folder / "config.yaml", config) or resolve(config, training, channels)
    volumes = _prepared((*training, *validation), config, values, channels)[: len(training)]
    state = begin(config, channels, len(values), device, volumes)
    take_step(state, config, volumes, len(values))
    if config.network.kind == "conditional":
        state.teach_denoiser()
        take_step(state, config, volumes, len(values))
    say(f"{len(training)} cases to train on, {len(validation)} to validate; one step went through")
    return yaml.safe_dump(plain(config), sort_keys=False)


def plan(config: Config) -> tuple[Dataset, tuple[Case, ...], tuple[Case, ...]]:
    """The data set, and its cases for training and for validation. Raises UserError."""
    path_of(config, config.segment.steps)
    dataset = read_dataset(config.data.root)
    training, validation = split(dataset, config.data.folds, config.data.fold)
    unlabelled = [case.name for case in dataset.cases if not case.labels]
    if (config.task == "segment" or config.data.pairs) and unlabelled:
        what = f"{len(unlabelled)} cases have no label map, the first is {unlabelled[0]}"
        raise UserError(config.data.root, what, "Label them, or move them out of 'training' in dataset.json.")
    if config.data.pairs and any(case.ignore is not None for case in dataset.cases):
        what = "it has a label to ignore, and pairs are made of whole masks"
        raise UserError(config.data.root, what, "Set data.pairs to false, or label every voxel.")
    digests = {case.name: "".join(map(file_digest, case.images)) for case in dataset.cases}
    for error in twins(dataset.root, digests):
        raise error
    return dataset, training, validation


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
    """Writes `model.safetensors`, judges the file, writes into it scores and calibration, keeps the best.

    The best, `best.safetensors`, is that of the least NLL where a distribution of masks is learned: it rises when the
    network becomes too sure, and Dice does not fall then. Once the denoiser is taught, the best is the last. Else it is
    that of the highest Dice, or the least loss.
    """
    path, weights = folder / "model.safetensors", state.average.state_dict()
    about = Description(without_paths(config), dataset.labels, dataset.channels, {}, tags, {"steps": state.step})
    save_model(path, weights, about)
    metrics, calibration = validate(path, device, cases, held_out, config.seed)
    seeds = [(config.seed, 2**40 + index) for index in range(VALIDATION_BATCHES)]
    losses = [held_out_loss(state.average, config, held_out, len(dataset.labels), seed) for seed in seeds]
    metrics["val/loss"] = float(torch.stack(losses).mean())
    save_model(path, weights, replace(about, scores=metrics, calibration=calibration))
    if config.network.kind == "conditional":
        found = -metrics["val/nll"]
    else:
        found = metrics.get("val/dice", -metrics["val/loss"])
    better = found > state.best
    if not state.denoising:
        state.stale = 0 if better else state.stale + 1
    if better or state.denoising:
        state.best = found
        with replacing(folder / "best.safetensors") as temporary:
            shutil.copyfile(path, temporary)
    return metrics


def _mean_head_done(state: State, config: Config) -> bool:
    """Whether it is time for the second stage of the conditional network."""
    if config.network.kind != "conditional" or state.denoising:
        return False
    return state.stage_spent(config) >= 1 or state.impatient(config.train)


def _done(state: State, config: Config) -> bool:
    """Whether nothing is left to learn: the budget is spent, or the patience."""
    if config.network.kind == "conditional":
        return state.denoising and state.stage_spent(config) >= 1
    return state.stage_spent(config) >= 1 or state.impatient(config.train)


def _prepared(cases: Sequence[Case], config: Config, values: list[int], channels: int) -> list[Volume]:
    how, folder = preprocessing(config.data), config.data.cache
    with progress("preparing volumes", len(cases)) as advance:
        volumes = load_volumes(
            cases, how, values=values, channels=channels, folder=folder, progress=lambda _: advance()
        )
    labelled = [volume for volume in volumes if len(volume.labels)]
    if empty := sorted(volume.name for volume in labelled if not volume.centres):
        say(f"warning: the labels of {len(empty)} of {len(volumes)} cases are empty: {first(empty)}")
    if full := sorted(volume.name for volume in labelled if volume.labels.all()):
        say(f"warning: every voxel is labelled in {first(full)}; is their background really 0?")
    return volumes


@contextmanager
def _finishing(tracker: Tracker) -> Iterator[None]:
    """Whatever ends the work early, the run doesn't stay open."""
    try:
        yield
    except BaseException:
        tracker.finish(ok=False)
        raise


def _resident(volumes: Sequence[Volume], device: torch.device) -> list[Volume]:
    """Volumes on the device where they take less than half of its free memory; else where they are."""
    size = sum(v.image.nbytes + v.labels.nbytes for v in volumes)
    if device.type != "cuda" or size > torch.cuda.mem_get_info(device)[0] / 2:
        return list(volumes)
    return [Volume(v.name, v.image.to(device), v.labels.to(device), v.centres) for v in volumes]


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != ".lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
