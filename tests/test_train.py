"""Training: what it leaves, how it resumes, what it refuses. A tiny network on phantoms."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from medseg_diff import train as training
from medseg_diff.checkpoint import build, describe
from medseg_diff.config import Config, plain
from medseg_diff.config_file import parse_config
from medseg_diff.datasets.cache import Volume
from medseg_diff.datasets.phantom import make_phantom
from medseg_diff.errors import UserError
from medseg_diff.train import rehearse, train
from medseg_diff.training import step as stepping
from medseg_diff.training.settings import resolve
from medseg_diff.training.state import begin
from medseg_diff.training.step import take_step

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "phantom"
    make_phantom(folder, 5, "ct", 1, 0)
    return folder


def settings(data: Path, folder: Path, kind: str = "conditional", **train_settings) -> Config:
    return parse_config(
        {
            "data": {
                "root": str(data), "cache": str(data.parent / "cache"), "modality": "ct", "size": [16, 16, 16],
                "spacing_mm": [2.0, 2.0, 3.0],
            },
            "network": {"kind": kind, "widths": [8, 8, 8, 8]},
            "train": {"steps": 6, "checkpoint_every": 2, "validations": 2, "batch_size": 1, **train_settings},
            "segment": {"samples": 2},
            "tracking": {"uri": ""},
        },
        "test",
    )  # fmt: skip


def weights(folder: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "straight"
    train(settings(data, folder), folder, CPU)
    return folder


def test_leaves_what_is_promised(straight: Path):
    found = {path.name for path in straight.iterdir()}
    assert found >= {"config.yaml", "state.pt", "model.safetensors", "best.safetensors", "metrics.csv", "summary.json"}
    assert found >= {"curves.png", "process.png", "preview.png"}
    assert not [name for name in found if name.startswith(".") and name != ".lock"]
    with (straight / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["step"] for row in rows if row["metric"] == "val/dice"} == {"3", "6"}
    about, _ = describe(straight / "model.safetensors")
    assert about.trained == {"steps": 6}
    assert about.config.data.root == Path("phantom")
    best, _ = describe(straight / "best.safetensors")
    assert best.scores["val/dice"] == json.loads((straight / "summary.json").read_text())["val/dice"]
    assert (best.calibration.cases, best.calibration.intervals) == (1, {}), (
        "one case to validate, too few for intervals"
    )
    assert best.calibration.nll_after <= best.calibration.nll_before
    assert about.config.tracking.uri == "sqlite:///mlflow.db", "a model names nobody's store"
    assert torch.load(straight / "state.pt", weights_only=True)["counters"]["step"] == 6


def test_the_weights_of_the_classes_are_saved_with_a_run(data: Path, tmp_path: Path):
    config = settings(data, tmp_path)
    state, other = (begin(config, 1, 3, CPU) for _ in range(2))
    state.class_weight, state.step = torch.tensor([0.5, 1.0, 3.0]), 7
    state.score.typical += 2
    state.save(tmp_path / "state.pt")
    assert torch.equal(
        torch.load(tmp_path / "state.pt", weights_only=True)["counters"]["class_weight"], state.class_weight
    )
    other.load(tmp_path / "state.pt", CPU)
    assert torch.equal(other.class_weight, state.class_weight)
    assert (other.step, other.score.typical.tolist()) == (7, state.score.typical.tolist())


def test_a_state_of_another_network_is_refused(data: Path, tmp_path: Path):
    config = settings(data, tmp_path)
    wide = parse_config(plain(config) | {"network": {"widths": [8, 8, 8, 16]}}, "test")
    begin(wide, 1, 3, CPU).save(tmp_path / "state.pt")
    with pytest.raises(UserError, match="another version's network"):
        begin(config, 1, 3, CPU).load(tmp_path / "state.pt", CPU)


def test_the_best_model_is_the_one_with_the_best_validation(straight: Path):
    with (straight / "metrics.csv").open() as file:
        nll = [float(row["value"]) for row in csv.DictReader(file) if row["metric"] == "val/nll"]
    assert len(nll) == 2
    assert describe(straight / "best.safetensors")[0].scores["val/nll"] == min(nll)


@pytest.mark.parametrize(("patience", "steps"), [(2, 3), (None, 4)])
def test_patience_ends_what_no_longer_improves(patience, steps, data, tmp_path, monkeypatch):
    """A network that learns nothing is never better than at its first validation; broken off and resumed here."""
    folder, step = tmp_path / "run", training.take_step
    config = settings(data, folder, "unet", steps=4, lr=1e-30, validations=4, patience=patience, checkpoint_every=1)

    def breaking(state, *rest):
        if state.step == 2:
            raise ConnectionAbortedError
        return step(state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(training, "take_step", breaking)
        with pytest.raises(ConnectionAbortedError):
            train(config, folder, CPU)
    assert train(config, folder, CPU)["steps"] == steps
    assert describe(folder / "best.safetensors")[0].trained == {"steps": 1}
    counters = torch.load(folder / "state.pt", weights_only=True)["counters"]
    assert (counters["stale"], counters["validated"]) == (steps - 1, steps)


def test_the_denoiser_begins_when_the_mean_head_no_longer_improves(data, tmp_path, capsys):
    """And it has its share of the budget all the same: 1.2 of 8 steps."""
    config = settings(data, tmp_path, steps=8, lr=1e-30, validations=8, patience=2)
    assert train(config, tmp_path, CPU)["steps"] == 5
    assert "step 3: the mean head is done, the denoiser begins" in capsys.readouterr().err
    assert describe(tmp_path / "best.safetensors")[0].trained == {"steps": 5}


def test_a_step_longer_than_the_budget_ends_it(data, tmp_path, monkeypatch):
    """Its time counts, whatever stage it leaves no time for."""
    step = training.take_step

    def slow(state, *rest):
        state.elapsed_s += 300
        return step(state, *rest)

    monkeypatch.setattr(training, "take_step", slow)
    config = settings(data, tmp_path, steps=6, max_minutes=1, validations=2)
    assert train(config, tmp_path, CPU)["steps"] == 1
    assert describe(tmp_path / "best.safetensors")[0].trained == {"steps": 1}


def test_the_denoiser_learns_after_the_mean_head(data: Path, tmp_path: Path):
    """And alone: what was learned before rests, in the network and in the average, or goes back to a better one."""
    config = resolve(settings(data, tmp_path, steps=20), (), 1)
    image = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    volumes = [Volume("a", image, (image > 0).byte(), ())]
    state, better = begin(config, 1, 3, CPU, volumes), build(config, 1, 3)
    histories: dict[str, list[Tensor]] = {"denoiser": [], "mean_head": []}
    for state.step in range(14, 20):
        if state.step == 17:
            assert state.stage_spent(config) == 1
            state.teach_denoiser(better)
            assert (state.stage_step, state.stage_spent(config)) == (17, 0)
        take_step(state, config, volumes, 3)
        for part, history in histories.items():
            weight = getattr(state.average, part)
            history.append(torch.cat([p.detach().flatten().clone() for p in weight.parameters()]))
    for part, resting, learning in (("denoiser", (1, 2), (3, 4, 5)), ("mean_head", (4, 5), (1, 2))):
        history = histories[part]
        assert all(torch.equal(history[i], history[i - 1]) for i in resting), part
        assert not any(torch.equal(history[i], history[i - 1]) for i in learning), part
    assert torch.equal(histories["mean_head"][3], torch.cat([p.flatten() for p in better.mean_head.parameters()]))


def test_a_finished_run_is_left_alone_and_fresh_starts_again(straight: Path, data: Path, tmp_path: Path):
    before = (straight / "model.safetensors").read_bytes()
    train(settings(data, straight), straight, CPU)
    assert (straight / "model.safetensors").read_bytes() == before
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "summary.json").write_text("{}")
    train(settings(data, folder), folder, CPU, fresh=True)
    assert (folder / "model.safetensors").read_bytes() == before, "the same seed gives the same bytes"


@pytest.mark.parametrize("crash", [1, 3, 5])
def test_a_run_that_broke_off_ends_with_the_same_bytes(crash, straight, data, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    step = training.take_step

    def breaking(state, *rest):
        if state.step == crash:
            raise ConnectionAbortedError
        return step(state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(training, "take_step", breaking)
        with pytest.raises(ConnectionAbortedError):
            train(settings(data, folder), folder, CPU)
    train(settings(data, folder), folder, CPU)
    assert (folder / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
    assert (folder / "metrics.csv").read_text() == (straight / "metrics.csv").read_text()


def test_sigterm_saves_first_and_resumes(straight, data, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    step = training.take_step

    def signalled(state, *rest):
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(training, "take_step", signalled)
        with pytest.raises(SystemExit) as stopped:
            train(settings(data, folder), folder, CPU)
    assert stopped.value.code == 143
    assert torch.load(folder / "state.pt", weights_only=True)["counters"]["step"] == 4
    train(settings(data, folder), folder, CPU)
    assert same(weights(folder), weights(straight))


@pytest.mark.slow
def test_sigkill_at_any_moment_loses_nothing(straight, data, tmp_path):
    """A real process, killed twice; its last start ends with the weights of an uninterrupted run."""
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(settings(data, tmp_path).model_dump(mode="json")))
    command = [sys.executable, "-m", "medseg_diff", "train", "--config", str(config), "--name", "run"]
    folder = tmp_path / "runs/run"
    for awaited in ("config.yaml", "state.pt"):
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE)
        limit = time.monotonic() + 120
        while not (folder / awaited).exists() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=240)
    assert same(weights(folder), weights(straight))


def test_minutes_end_a_run_too(data: Path, tmp_path: Path):
    summary = train(settings(data, tmp_path / "run", steps=100_000, max_minutes=0.02), tmp_path / "run", CPU)
    assert 0 < summary["steps"] < 2000
    assert summary["minutes"] == pytest.approx(0.02, abs=0.02)


def test_another_configuration_is_refused_with_the_difference(straight: Path, data: Path, tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text((straight / "config.yaml").read_text())
    with pytest.raises(UserError, match=r"train\.lr: 0\.002 -> 0\.1.*--fresh"):
        train(settings(data, folder, lr=0.1), folder, CPU)


def test_a_finished_run_does_not_answer_for_another_configuration(straight: Path, data: Path):
    with pytest.raises(UserError, match=r"train\.lr"):
        train(settings(data, straight, lr=0.1), straight, CPU)


def test_a_data_set_that_changed_is_not_trained_on(data: Path, tmp_path: Path):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    train(settings(copy, tmp_path, steps=2, validations=1), tmp_path / "run", CPU)
    (tmp_path / "run/summary.json").unlink()
    first = next((copy / "labelsTr").iterdir())
    first.write_bytes(next(p for p in (copy / "labelsTr").iterdir() if p != first).read_bytes())
    description = json.loads((copy / "dataset.json").read_text())
    for path in description["training"].pop(0).values():
        (copy / path).unlink()
    (copy / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="changed since"):
        train(settings(copy, tmp_path, steps=3, validations=1), tmp_path / "run", CPU)


def test_an_error_closes_the_tracked_run(data: Path, tmp_path: Path, monkeypatch):
    from medseg_diff.compare import compare

    values = settings(data, tmp_path).model_dump(mode="json")
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    values["tracking"] = {"uri": store, "experiment": "broken"}

    def breaking(*_):
        raise ConnectionAbortedError

    monkeypatch.setattr(training, "take_step", breaking)
    with pytest.raises(ConnectionAbortedError):
        train(parse_config(values, "test"), tmp_path / "run", CPU)
    assert [row["status"] for row in compare(store, None)] == ["failed"]


def test_a_longer_budget_goes_on(straight: Path, data: Path, tmp_path: Path):
    folder = tmp_path / "run"
    train(settings(data, folder, steps=2, validations=1), folder, CPU)
    (folder / "summary.json").unlink()
    assert train(settings(data, folder, steps=3, validations=1), folder, CPU)["steps"] == 3


def test_a_longer_budget_is_the_mean_heads_first(data: Path, tmp_path: Path):
    """Unless it had stopped improving; and a denoiser that is past its share goes on."""
    state = begin(settings(data, tmp_path), 1, 3, CPU)
    for stale, longer, denoising in ((0, 8, False), (3, 8, True), (0, 7, True)):
        state.step, state.stale = 6, stale
        state.teach_denoiser()
        state.extend(settings(data, tmp_path, steps=longer, patience=3).train)
        assert state.denoising == denoising
        assert state.stage_step == (6 if denoising else 0)


def test_steps_without_a_finite_loss_are_skipped_and_counted(data: Path, tmp_path: Path, monkeypatch):
    loss_of = stepping.loss_of

    calls = []

    def poisoned(*arguments):
        calls.append(arguments)
        return loss_of(*arguments) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(stepping, "loss_of", poisoned)
    summary = train(settings(data, tmp_path / "run"), tmp_path / "run", CPU)
    assert summary["skipped"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "run").values())


def test_a_loss_that_is_never_finite_stops_with_advice(data: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(stepping, "MOST_SKIPPED", 2)
    loss_of = stepping.loss_of
    monkeypatch.setattr(stepping, "loss_of", lambda *a: loss_of(*a) * float("nan"))
    with pytest.raises(UserError, match=r"Lower train\.lr"):
        train(settings(data, tmp_path / "run"), tmp_path / "run", CPU)


def test_the_spacing_is_the_median_of_the_training_cases(hippocampus: Path):
    config = parse_config({"data": {"root": str(hippocampus), "size": [32, 48, 32]}}, "test")
    _, cases, _ = training.plan(config)
    assert resolve(config, cases[:3], 1).data.spacing_mm == (1.0, 1.0, 1.0)


def test_a_rehearsal_writes_no_run(data: Path, tmp_path: Path):
    text = rehearse(settings(data, tmp_path), tmp_path / "runs/run", CPU)
    assert "spacing_mm" in text
    assert not (tmp_path / "runs").exists()


def test_a_rehearsal_reads_every_label(data: Path, tmp_path: Path):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    last = sorted((copy / "labelsTr").iterdir())[-1]
    last.write_bytes(last.read_bytes()[:100])
    with pytest.raises(UserError, match=last.name):
        rehearse(settings(copy, tmp_path), tmp_path / "runs/run", CPU)


@pytest.mark.parametrize(
    ("kind", "task", "extra"),
    [
        ("unet", "segment", {}),
        ("unconditional", "generate", {"spatial_dims": 2, "size": [16, 16], "neighbours": 0}),
        ("unconditional", "generate", {"spatial_dims": 2, "size": [16, 16], "neighbours": 0, "pairs": True}),
        ("classic_unet", "generate", {"spatial_dims": 2, "size": [16, 16], "neighbours": 0}),
        ("conditional", "segment", {"spatial_dims": 2, "size": [32, 32], "axis": 1}),
        ("medsegdiff_v1", "segment", {"spatial_dims": 2, "size": [32, 32], "axis": 2}),
        ("medsegdiff_v2", "segment", {"spatial_dims": 2, "size": [32, 32], "axis": 2}),
        ("classic_unet", "segment", {}),
    ],
)
def test_every_kind_trains(kind, task, extra, data, tmp_path):
    values = settings(data, tmp_path).model_dump(mode="json")
    values |= {"task": task, "network": {"kind": kind, "widths": [8, 8, 8, 8]}, "data": values["data"] | extra}
    summary = train(parse_config(values, "test"), tmp_path / "run", CPU)
    assert ("val/dice" in summary) == (task == "segment")
    assert summary["val/loss"] > 0


def test_two_processes_do_not_share_a_run(straight: Path, data: Path):
    from medseg_diff.files import owned

    with owned(straight), pytest.raises(UserError, match="another process"):
        train(settings(data, straight), straight, CPU)
