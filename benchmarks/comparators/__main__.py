"""One run: trains a method for its CPU time, judges it on the validation cases, keeps weights and scores.

Started by `protocol.ensure`, with a Run as JSON.
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from comparators import audit, ensemble, mc_dropout, monai_ddpm, nnunet, ours, ssn, temperature
from comparators.judge import judge
from comparators.protocol import Prediction, Run, circumstances, configuration, model_of, volumes_of
from medseg_diff.checkpoint import Model
from medseg_diff.config import Config
from medseg_diff.datasets.cache import Volume
from medseg_diff.files import replacing

FEW_STEPS = ("segment.steps=10",)
OUR_WAY = (
    "diffusion.prediction=x0", "diffusion.schedule=cosine", "diffusion.zero_terminal=true", "diffusion.scale=0.2",
    "diffusion.pure_noise=0.1", "segment.sampler=ddpm",
)  # fmt: skip

MODULES: dict[str, tuple[ModuleType, tuple[str, ...]]] = {
    "conditional": (ours, ()),
    "unet": (ours, ("network.kind=unet",)),
    "mc_dropout": (mc_dropout, ("network.kind=unet",)),
    "ssn": (ssn, ("network.kind=unet",)),
    "monai_ddpm": (monai_ddpm, ("network.kind=unet", "train.lr=0.0005")),
    "v1": (ours, FEW_STEPS),
    "v2": (ours, FEW_STEPS),
    "v2_x0": (ours, (*FEW_STEPS, *OUR_WAY)),
}
"""What builds, trains and predicts, and what differs from the configuration."""


def main() -> None:
    description = json.loads(sys.argv[1])
    run = Run(**{**description, "data": Path(description["data"]), "work": Path(description["work"])})
    torch.set_num_threads(1)
    found = perform(run) | {"run": {**description, "data": run.data.name, "work": run.work.name}} | circumstances()
    with replacing(run.path) as temporary:
        temporary.write_text(json.dumps(defined(found), indent=1, allow_nan=False) + "\n")


def perform(run: Run) -> dict[str, Any]:
    """The scores and what they cost."""
    match run.method:
        case "temperature":
            return temperature.perform(run, trained(replace(run, method="unet")))
        case "audit":
            return audit.perform(run, trained(replace(run, method="conditional")))
        case "ensemble":
            members = [trained(replace(run, method="unet", seed=run.seed + k)) for k in range(ensemble.MEMBERS)]
            return scored(run, ensemble, members)
        case "nnunet_2d" | "nnunet_3d":
            return nnunet.perform(run)
    model = trained(run)
    return scored(run, MODULES[run.method][0], model)


def trained(run: Run) -> Model:
    """The method's network, from its file or trained into it."""
    module, settings = MODULES[run.method]
    config = configuration(run, settings)
    dataset, training, _ = volumes_of(run, config)
    classes, path = len(dataset.labels), run.work / f"{run.trained}.safetensors"
    network = module.build(config, len(dataset.channels), classes)
    if not path.exists():
        begun = time.process_time()
        network, steps = module.train(training, config, classes, run.minutes * 60)
        spent = {"steps": str(steps), "cpu_s": f"{time.process_time() - begun:.1f}"}
        with replacing(path) as temporary:
            save_file({k: v.contiguous() for k, v in network.state_dict().items()}, temporary, metadata=spent)
    network.load_state_dict(load_file(path))
    return model_of(network, config, dataset)


def scored(run: Run, module: ModuleType, model: Any) -> dict[str, Any]:
    """Scores of the validation cases, case i with seed i, and CPU seconds a volume."""
    first = model[0] if isinstance(model, list) else model
    config: Config = first.about.config
    _, _, validation = volumes_of(run, config)
    seconds = []

    def predictions() -> Iterator[tuple[Volume, Prediction]]:
        for index, volume in enumerate(validation):
            begun = time.process_time()
            found = module.predict(model, volume, run.samples, index)
            seconds.append(time.process_time() - begun)
            yield volume, found

    assert config.data.spacing_mm is not None, "the shipped configurations of the hippocampus name it"
    found = judge(predictions(), first.about.labels, config.data.spacing_mm)
    return found | {"seconds_a_volume": median(seconds), "training": training_of(run)}


def training_of(run: Run) -> dict[str, str]:
    """Steps and CPU seconds, from the header of the weights."""
    from safetensors import safe_open

    path = run.work / f"{run.trained}.safetensors"
    if not path.exists():
        return {}
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def defined(found: Any) -> Any:
    """JSON has no nan: null in its place."""
    match found:
        case dict():
            return {key: defined(value) for key, value in found.items()}
        case list():
            return [defined(value) for value in found]
        case float() if math.isnan(found):
            return None
    return found


if __name__ == "__main__":
    main()
