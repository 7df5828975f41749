"""Model files that explain themselves, and states to resume from. No pickle is ever opened."""

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from medseg_diff import __version__, calibrated
from medseg_diff.calibrated import Calibrated
from medseg_diff.config import Config, plain
from medseg_diff.config_file import YAML_ERRORS, parse_config
from medseg_diff.errors import UserError, reason
from medseg_diff.files import replacing
from medseg_diff.networks import build_generator, build_network

FORMAT = "medseg-diff model 1"
ENVIRONMENT = "MEDSEG_DIFF_MODEL"
FINISHED = "summary.json"
"""A run is finished when it holds this file."""


@dataclass(frozen=True)
class Description:
    """What a model file says of itself."""

    config: Config
    labels: dict[int, str]
    channels: tuple[str, ...]
    scores: dict[str, Any]
    dataset: dict[str, Any]
    trained: dict[str, Any]
    version: str = __version__
    calibration: Calibrated | None = None


@dataclass(frozen=True)
class Model:
    """A network ready to use, in evaluation mode on its device."""

    network: Any
    about: Description
    path: Path
    digest: str
    device: torch.device


def build(config: Config, channels: int, classes: int) -> nn.Module:
    """The network that a configuration asks for, with weights drawn from its seed."""
    network, data = config.network, config.data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.task == "generate":
            inputs = channels + (classes if data.pairs else 0)
            outputs = inputs * (2 if config.diffusion.variance == "learned" else 1)
            return build_generator(network.kind, data.spatial_dims, inputs, outputs, network.widths)
        stacked = channels * (2 * data.neighbours + 1) if data.spatial_dims == 2 else channels
        return build_network(
            network.kind, data.spatial_dims, stacked, classes, network.widths, size=data.size, padding=network.padding
        )


def save_model(path: Path, weights: Mapping[str, Tensor], about: Description) -> str:
    """Writes one safetensors file, whole or not at all; returns its digest."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(weights.items())}
    calibration = calibrated.plain(about.calibration)
    description = json.dumps(
        {
            "config": plain(about.config),
            "labels": {str(value): name for value, name in about.labels.items()},
            "channels": list(about.channels),
            "scores": about.scores,
            "dataset": about.dataset,
            "trained": about.trained,
            "version": about.version,
        }
        | ({} if calibration is None else {"calibration": calibration}),
        sort_keys=True,
    )
    digest = _digest(tensors, description)
    content = _ordered(save(tensors, metadata={"format": FORMAT, "description": description, "digest": digest}))
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return digest


def describe(path: Path) -> tuple[Description, str]:
    """Header and digest of a model file, without its weights. Raises UserError."""
    with _opened(path) as file:
        return _description(path, file.metadata())


def load_model(path: Path, device: torch.device) -> Model:
    """Reads a model file and checks its digest. Raises UserError for whatever is not a whole model of ours."""
    advice = "Copy the file again, or train the model again."
    with _opened(path) as file:
        about, stated = _description(path, file.metadata())
        slices = {name: file.get_slice(name) for name in sorted(file.keys())}
        misfit = _misfit(about, {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()})
        if misfit:
            raise UserError(path, f"its weights do not fit the network that its header describes: {misfit}", advice)
        tensors = {name: file.get_tensor(name) for name in slices}
        text = file.metadata()["description"]
    if _digest(tensors, text) != stated:
        raise UserError(path, "its content does not fit the digest in its header: the file is damaged", advice)
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise UserError(path, f"its weights {bad[0]} are not finite", "Train the model again.")
    network = _network(about)
    network.load_state_dict(tensors)
    return Model(network.to(device).eval().requires_grad_(False), about, path, stated, device)


def explain(path: Path) -> dict[str, Any]:
    """The header of a model file as plain values."""
    about, digest = describe(path)
    return {
        "model": str(path),
        "digest": digest,
        "version": about.version,
        "labels": {str(value): name for value, name in about.labels.items()},
        "channels": list(about.channels),
        "trained": about.trained,
        "scores": about.scores,
        "calibration": calibrated.told(about.calibration),
        "dataset": about.dataset,
        "config": plain(about.config),
    }


def shipped() -> dict[str, Path]:
    """The models that come with the package, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "models").glob("*.safetensors"))}


def find_model(given: str | None, task: str) -> tuple[Path, str]:
    """The model file, and where it was found: as given, else from the environment, else of the newest finished run.

    A file or folder that is named goes before a shipped model of the same name. Raises UserError.
    """
    named = given or os.environ.get(ENVIRONMENT)
    if named:
        where, path = f"--model {given}" if given else f"${ENVIRONMENT}", Path(named)
        if not path.exists() and named in shipped():
            return shipped()[named], f"{where if given else f'{where}={named}'}, shipped with medseg-diff"
        if path.is_dir():
            path = path / "best.safetensors"
        if not path.is_file():
            advice = f"Give --model a .safetensors file or the folder of a finished run{_or_shipped(task)}."
            raise UserError(named, "there is no such model", advice)
        return path, where
    finished = sorted(Path("runs").glob(f"*/{FINISHED}"), key=lambda p: p.stat().st_mtime, reverse=True)
    for summary in finished:
        if _task(summary.parent) == task and (summary.parent / "best.safetensors").is_file():
            return summary.parent / "best.safetensors", f"the newest finished run, {summary.parent}"
    what = f"no model: no --model, no ${ENVIRONMENT}, and no finished run of task {task} under ./runs"
    advice = "Train one (medseg-diff train --config configs/quickstart.yaml), or name one by --model FILE"
    raise UserError(task, what, f"{advice}{_or_shipped(task)}.")


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes what a run needs to go on, whole or not at all. Raises UserError."""
    content = io.BytesIO()  # torch.save hides a full disk behind a RuntimeError
    torch.save(state, content)
    with replacing(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def load_state(path: Path, device: torch.device) -> dict[str, Any]:
    """Reads a state; tensors and plain values only. Raises UserError."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise UserError(path, f"cannot be resumed: {reason(error)}", "Start again with --fresh.") from error
    if not isinstance(state, dict):
        raise UserError(path, "cannot be resumed: it holds no state of a run", "Start again with --fresh.")
    return state


def _ordered(content: bytes) -> bytes:
    """The same file with its header sorted: safetensors writes metadata in another order each time."""
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    advice = "Give a .safetensors file that medseg-diff train wrote."
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                raise UserError(path, "is no model of medseg-diff", advice)
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(path, f"is no readable model ({reason(error)})", advice) from error


def _description(path: Path, metadata: dict[str, str]) -> tuple[Description, str]:
    try:
        held = json.loads(metadata["description"])
        about = Description(
            config=parse_config(held["config"], path),
            labels=dict(sorted((int(value), name) for value, name in held["labels"].items())),
            channels=tuple(held["channels"]),
            scores=held["scores"],
            dataset=held["dataset"],
            trained=held["trained"],
            version=held["version"],
            calibration=calibrated.parse(held.get("calibration")),
        )
        return about, metadata["digest"]
    except (KeyError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(path, f"its header is damaged ({reason(error)})", "Train the model again.") from error


def _network(about: Description) -> nn.Module:
    return build(about.config, len(about.channels), len(about.labels))


def _misfit(about: Description, found: dict[str, tuple[str, list[int]]]) -> str | None:
    """The first weight that differs from the network's; nothing is allocated for what a header only claims."""
    with torch.device("meta"):
        wanted = {name: ("F32", list(tensor.shape)) for name, tensor in _network(about).state_dict().items()}
    different = (name for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name))
    return next((f"{name} is {found.get(name)}, not {wanted.get(name)}" for name in different), None)


def _digest(tensors: Mapping[str, Tensor], description: str) -> str:
    digest = hashlib.sha256(description.encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _or_shipped(task: str) -> str:
    """What an error adds to its advice: the shipped models of a task, and what each segments."""
    found = ""
    for name, path in shipped().items():
        about = describe(path)[0]
        if about.config.task == task:
            parts = ", ".join(part for value, part in about.labels.items() if value)
            found += f", or --model {name}, which is shipped ({', '.join(about.channels)}: {parts})"
    return found


def _task(run: Path) -> str | None:
    try:
        return yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")).get("task")
    except (OSError, *YAML_ERRORS, AttributeError):
        return None
