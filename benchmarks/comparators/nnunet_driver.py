"""Runs in nnU-Net's own environment, with nothing of ours: its trainer for a CPU time, its prediction, its speed.

The learning rate follows nnU-Net's polynomial over the CPU time, where its own is over 1000 epochs that don't fit.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

CPU = torch.device("cpu")
DATASET = "Dataset004_Hippocampus"


def main() -> None:
    task = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    out = Path(task["out"])
    out.mkdir(parents=True, exist_ok=True)
    if "measure" in task:
        (out / "speed.json").write_text(json.dumps(speed(task)))
        return
    trainer = begin(task)
    weights = out / "network.pt"
    if weights.exists():
        trainer.network.load_state_dict(torch.load(weights, weights_only=True))
    else:
        (out / "training.json").write_text(json.dumps(train(trainer, task["cpu_seconds"])))
        torch.save(trainer.network.state_dict(), weights)
    predict(trainer, task["predict"], out)


def begin(task: dict[str, Any]) -> Any:
    """nnU-Net's trainer with our split; with another patch and batch than planned where they are given."""
    folder = Path(nnUNet_preprocessed) / DATASET
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans["continue_training"] = False
    planned = plans["configurations"][task["configuration"]]
    planned["patch_size"] = task.get("patch", planned["patch_size"])
    planned["batch_size"] = task.get("batch", planned["batch_size"])
    trainer = nnUNetTrainer(plans, task["configuration"], 0, json.loads((folder / "dataset.json").read_text()), CPU)
    trainer.do_split = lambda: (task["train"], task["predict"])
    trainer.initialize()
    trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()  # else prediction would not mirror
    return trainer


def train(trainer: Any, cpu_seconds: float) -> dict[str, float]:
    """Steps until the CPU time of this process, which loads the data itself, is spent."""
    trainer.on_train_start()
    trainer.network.train()
    begun, count = time.process_time(), 0
    while (spent := (time.process_time() - begun) / cpu_seconds) < 1:
        for group in trainer.optimizer.param_groups:
            group["lr"] = trainer.initial_lr * (1 - spent) ** 0.9
        trainer.train_step(next(trainer.dataloader_train))
        count += 1
    return {"steps": count, "cpu_s": time.process_time() - begun}


def predictor_of(trainer: Any) -> nnUNetPredictor:
    """With overlapping windows and mirroring, nnU-Net's defaults."""
    predictor = nnUNetPredictor(perform_everything_on_device=False, device=CPU, allow_tqdm=False)
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    predictor.manual_initialization(
        trainer.network, trainer.plans_manager, trainer.configuration_manager, [trainer.network.state_dict()],
        trainer.dataset_json, "nnUNetTrainer", trainer.inference_allowed_mirroring_axes,
    )  # fmt: skip
    return predictor


def predict(trainer: Any, names: list[str], out: Path) -> None:
    """Probabilities [classes, z, y, x] of each case, and CPU seconds from the file to them."""
    predictor, seconds = predictor_of(trainer), {}
    for name in names:
        path = Path(nnUNet_raw) / DATASET / f"imagesTr/{name}_0000.nii.gz"
        begun = time.process_time()
        image, properties = SimpleITKIO().read_images([str(path)])
        _, probabilities = predictor.predict_single_npy_array(image, properties, None, None, True)
        seconds[name] = time.process_time() - begun
        np.save(out / f"{name}.npy", probabilities.astype(np.float32))
    (out / "prediction.json").write_text(json.dumps(seconds))


def speed(task: dict[str, Any]) -> dict[str, list[float]]:
    """CPU seconds of so many training steps, with their loading, after a first one; and of predictions."""
    trainer, steps = begin(task), []
    if task["measure"]:
        trainer.on_train_start()
        trainer.network.train()
        for _ in range(task["measure"] + 1):
            begun = time.process_time()
            trainer.train_step(next(trainer.dataloader_train))
            steps.append(time.process_time() - begun)
    predict(trainer, task["predict"], Path(task["out"]))
    return {"step_s": steps[1:]}


if __name__ == "__main__":
    main()
