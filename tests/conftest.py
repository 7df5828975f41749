"""Fixtures shared by the tests: real data where it is there, a skip with the reason where it is not."""

import os
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported: tiny tensors gain nothing from threads, and threads that wait for each other lose much.
os.environ.setdefault("OMP_NUM_THREADS", "1")

DATA = Path(os.environ.get("MEDSEG_DIFF_DATA", Path(__file__).resolve().parents[2] / "shared/data"))


def _real(name: str) -> Path:
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"real data is absent: no {folder}; set MEDSEG_DIFF_DATA to the folder that holds it")
    return folder


@pytest.fixture(scope="session")
def hippocampus() -> Path:
    """Task04 of the Medical Segmentation Decathlon."""
    return _real("Task04_Hippocampus")


@pytest.fixture(scope="session")
def dicom() -> Path:
    """A folder of DICOM series, one folder each."""
    return _real("dicom")


LABELS = {0: "background", 7: "core", 205: "shell"}


def untrained(
    path: Path,
    kind: str = "conditional",
    dims: int = 3,
    task: str | None = None,
    labels: dict[int, str] = LABELS,
    channels: tuple[str, ...] = ("MR",),
    **changes: Any,
) -> Path:
    """A tiny model file whose silent layers are given a voice; it draws masks of every label, if not good ones."""
    import torch

    from medseg_diff.checkpoint import Description, build, save_model
    from medseg_diff.config_file import parse_config

    content = {
        "task": task or ("generate" if kind == "unconditional" else "segment"),
        "data": {"root": "nowhere", "spacing_mm": [1, 1, 1], "spatial_dims": dims, "size": [16] * dims, "axis": 2},
        "network": {"kind": kind, "widths": [8, 8, 8, 8]},
        "train": {"precision": "fp32"},
        "segment": {"samples": 4},
    }
    for key, value in changes.items():
        section, _, name = key.partition("_")
        content[section][name] = value
    config = parse_config(content, path)
    network = build(config, len(channels), len(labels))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.3, generator=generator)
    save_model(path, network.state_dict(), Description(config, labels, channels, {}, {}, {"steps": 0}))
    return path


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of tiny untrained models: volumes, slices, unet, unconditional and denoisers of masks and of pairs."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "volumes": untrained(folder / "volumes.safetensors"),
        "slices": untrained(folder / "slices.safetensors", dims=2, data_axis=1),
        "unet": untrained(folder / "unet.safetensors", "unet"),
        "unconditional": untrained(folder / "unconditional.safetensors", "unconditional"),
        "unconditional_slices": untrained(folder / "unconditional_slices.safetensors", "unconditional", dims=2),
        "pairs": untrained(folder / "pairs.safetensors", "unconditional", dims=2, data_pairs=True),
        "v1": untrained(folder / "v1.safetensors", "medsegdiff_v1", dims=2),
        "v2": untrained(folder / "v2.safetensors", "medsegdiff_v2", dims=2),
        "classic": untrained(folder / "classic.safetensors", "classic_unet"),
    }
