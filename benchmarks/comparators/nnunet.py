"""nnU-Net (Isensee et al. 2021), `nnunetv2` from PyPI in an environment of its own: planned, trained, predicted by it.

`nnunet_driver.py` is what runs there.
"""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import nibabel as nib
import numpy as np

from comparators.judge import judge
from comparators.protocol import ROOT, Run, configuration, volumes_of
from medseg_diff.datasets.layouts import Dataset, read_dataset, split

HOME = ROOT / "runs/nnunet"
PACKAGES = ("nnunetv2", "torch==2.14.1", "torchvision==0.29.1")
NAME = "Dataset004_Hippocampus"
CONFIGURATIONS = {"nnunet_2d": "2d", "nnunet_3d": "3d_fullres"}


def environment(results: Path = HOME / "results") -> dict[str, str]:
    """What nnU-Net reads: its folders, the loading of data in the process itself, one thread, no compilation."""
    folders = {"nnUNet_raw": str(HOME / "raw"), "nnUNet_preprocessed": str(HOME / "preprocessed")}
    folders["nnUNet_results"] = str(results)
    settings = {"nnUNet_n_proc_DA": "0", "nnUNet_compile": "f", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    return {**os.environ, **folders, **settings, "PYTHONPATH": ""}


def set_up(data: Path) -> None:
    """The environment, the data set in nnU-Net's layout, its plans and preprocessed volumes; what is there stays."""
    HOME.mkdir(parents=True, exist_ok=True)
    with (HOME / "lock").open("w") as lock:  # two runs may begin at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (HOME / "installed").exists():
            subprocess.run([sys.executable, "-m", "venv", HOME / ".venv"], check=True)
            subprocess.run([HOME / ".venv/bin/python", "-m", "pip", "install", "-q", *PACKAGES], check=True)
            (HOME / "installed").touch()
        if not (HOME / "prepared").exists():
            write_raw(read_dataset(data), HOME / "raw" / NAME)
            words = ["-d", "4", "-c", "2d", "3d_fullres", "-np", "1", "1", "-npfp", "1", "--no_pbar"]
            command = [HOME / ".venv/bin/nnUNetv2_plan_and_preprocess", *words]
            subprocess.run(command, env=environment(), check=True, stdout=subprocess.DEVNULL)
            (HOME / "prepared").touch()


def write_raw(dataset: Dataset, folder: Path) -> None:
    """Links to the images and labels of all cases."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for case in dataset.cases:
        for link, path in (
            (folder / f"imagesTr/{case.name}_0000.nii.gz", case.image),
            (folder / f"labelsTr/{case.name}.nii.gz", case.labels[0]),
        ):
            link.unlink(missing_ok=True)
            link.symlink_to(path.resolve())
    description = {
        "channel_names": {str(i): name for i, name in enumerate(dataset.channels)},
        "labels": {name: value for value, name in dataset.labels.items()},
        "numTraining": len(dataset.cases),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))


def perform(run: Run) -> dict[str, Any]:
    """Trains for the run's CPU time, predicts the validation cases, and scores them as all others are scored."""
    set_up(run.data)
    config = configuration(run)
    dataset, _, validation = volumes_of(run, config)
    training, held_out = split(dataset, config.data.folds, config.data.fold)
    out = run.work / run.trained
    drive(
        configuration=CONFIGURATIONS[run.method],
        cpu_seconds=run.minutes * 60,
        train=[case.name for case in training[: run.labelled]],
        predict=[case.name for case in held_out[: run.cases]],
        out=str(out),
    )
    spent = json.loads((out / "training.json").read_text())

    def probabilities(name: str) -> np.ndarray:
        """On the network's grid, which is the scan's: axes as SimpleITK has them, reversed."""
        affine = nib.load(HOME / f"raw/{NAME}/imagesTr/{name}_0000.nii.gz").affine
        assert np.allclose(affine[:3, :3], np.eye(3)), "1 mm along right, anterior, superior"
        return np.load(out / f"{name}.npy").transpose(0, 3, 2, 1).astype(np.float32)

    assert config.data.spacing_mm is not None
    predictions = ((volume, (probabilities(volume.name), None)) for volume in validation)
    found = judge(predictions, dataset.labels, config.data.spacing_mm)
    seconds = json.loads((out / "prediction.json").read_text())
    return found | {"training": spent, "seconds_a_volume": median(seconds.values())}


def drive(**task: Any) -> None:
    """Runs the driver in nnU-Net's own environment."""
    driver = Path(__file__).with_name("nnunet_driver.py")
    command = [str(HOME / ".venv/bin/python"), str(driver), json.dumps(task)]
    results = Path(task["out"]) / "results"
    subprocess.run(command, env=environment(results), check=True, stdout=subprocess.DEVNULL)
