"""Synthetic labelled scans: an abdomen as CT or MR shows it, for a first training run and for tests."""

import json
import secrets
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Num, UInt8
from scipy.spatial.transform import Rotation

from medseg_diff.console import progress
from medseg_diff.datasets.anatomy import draw_body
from medseg_diff.datasets.rendering import Modality, acquire, axes_mm, draw_look, field_at, paint
from medseg_diff.errors import UserError
from medseg_diff.scans.geometry import reoriented
from medseg_diff.scans.write import write_volume

LABELS = {0: "background", 1: "organ", 2: "vessel", 3: "lesion"}
GRIDS = (("RAS", 0.0), ("LPS", 0.0), ("LAS", 14.0), ("SRA", 0.0), ("PIR", -9.0))  # axis order, rotation in degrees
SLAB_VOXELS = 4_000_000


def draw_case(
    rng: np.random.Generator, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], modality: Modality
) -> tuple[Float32[np.ndarray, "x y z"], UInt8[np.ndarray, "x y z"]]:
    """One scan and its label map (see LABELS), axes to right, front and head; CT in HU, MR on a scale of its own."""
    image, label_maps = _draw(rng, shape, spacing_mm, modality, raters=1)
    return image, label_maps[0]


def make_phantom(folder: Path, cases: int, modality: Modality, raters: int, seed: int) -> None:
    """Write a data set in the Decathlon layout, whole or not at all.

    Case i depends on seed and i alone. The grids differ in shape, spacing and axis order, and some are oblique.
    Raises UserError for a folder that is not empty or cannot be written.
    """
    about = {
        "name": "Phantom",
        "description": f"Synthetic abdomens, drawn by medseg-diff with seed {seed}",
        "labels": LABELS,
    }
    write_set(folder, cases, modality, about, partial(_write_case, modality=modality, raters=raters, seed=seed))


def write_set(
    folder: Path,
    cases: int,
    modality: Modality,
    about: dict[str, Any],
    write_case: Callable[[Path, int], dict[str, str | list[str]]],
) -> None:
    """A new data set, whole or not at all; `write_case(folder, i)` writes a case and returns its entry in dataset.json.

    Raises UserError for a folder that is not empty or cannot be written.
    """
    place = folder.resolve()
    try:
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise UserError(folder, "it exists and is not empty", "Name a new folder, or empty this one.")
        unfinished = place.with_name(f".{secrets.token_hex(8)}")
        try:
            for name in ("imagesTr", "labelsTr"):
                (unfinished / name).mkdir(parents=True)
            training = []
            with progress("drawing cases", cases) as advance:
                for i in range(cases):
                    training.append(write_case(unfinished, i))
                    advance()
            description = about | {
                "licence": "CC0-1.0",
                "tensorImageSize": "3D",
                "modality": {"0": "CT" if modality == "ct" else "MRI"},
                "numTraining": cases,
                "training": training,
            }
            (unfinished / "dataset.json").write_text(json.dumps(description, indent=1) + "\n")
            unfinished.rename(place)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        what = f"it cannot be written ({error.strerror or error})"
        raise UserError(folder, what, "Free some space, or choose a folder that can be written to.") from error


def write_files(
    folder: Path,
    name: str,
    image: Num[np.ndarray, "x y z"],
    label_maps: UInt8[np.ndarray, "raters x y z"],
    affine: Float[np.ndarray, "4 4"],
    order: str,
) -> dict[str, str | list[str]]:
    """An image and its label files with their axes in `order`, such as RAS; returns the entry in dataset.json."""
    labels = [name] if len(label_maps) == 1 else [f"{name}_rater{r + 1}" for r in range(len(label_maps))]
    files = {f"imagesTr/{name}.nii.gz": image}
    files |= {f"labelsTr/{label}.nii.gz": drawn for label, drawn in zip(labels, label_maps, strict=True)}
    for path, volume in files.items():
        turned, turned_affine = reoriented(volume, affine, order)
        write_volume(turned[None], turned_affine, folder / path)
    image_path, *label_paths = (f"./{path}" for path in files)
    return {"image": image_path, "label": label_paths if len(label_paths) > 1 else label_paths[0]}


def centred_affine(
    shape: tuple[int, ...], spacing_mm: tuple[float, ...], degrees: float = 0.0
) -> Float[np.ndarray, "4 4"]:
    """Voxel -> world of a grid tilted about two axes, its centre away from the origin."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xz", [degrees, degrees / 2], degrees=True).as_matrix() * spacing_mm
    affine[:3, 3] = [12, -30, 55] - affine[:3, :3] @ (np.array(shape) - 1) / 2
    return affine


def _write_case(folder: Path, i: int, *, modality: Modality, raters: int, seed: int) -> dict[str, str | list[str]]:
    rng = np.random.default_rng([seed, i])
    shape = (int(rng.integers(44, 53)), int(rng.integers(44, 53)), int(rng.integers(24, 33)))
    spacing_mm = (0.9, 0.9, float(rng.choice([1.5, 2.0, 3.0])))
    image, label_maps = _draw(rng, shape, spacing_mm, modality, raters)
    order, degrees = GRIDS[i % len(GRIDS)]
    affine = centred_affine(shape, spacing_mm, degrees)
    stored = np.round(image).astype(np.int16) if modality == "ct" else image
    return write_files(folder, f"phantom_{i:03}", stored, label_maps, affine, order)


def _draw(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    modality: Modality,
    raters: int,
) -> tuple[Float32[np.ndarray, "x y z"], UInt8[np.ndarray, "raters x y z"]]:
    """The image is the same for any number of raters; several draw every border a smooth distance off."""
    body_rng, look_rng, noise_rng, rater_rng = rng.spawn(4)
    half_mm = np.array(shape) * spacing_mm / 2
    body = draw_body(body_rng, half_mm)
    look = draw_look(look_rng, half_mm, modality)
    pixel_mm = float(np.cbrt(np.prod(spacing_mm)))
    offsets_mm = rater_rng.normal(0, 1.2 * pixel_mm if raters > 1 else 0, (raters, 7, 7, 7))

    image = np.empty(shape, np.float32)
    label_maps = np.zeros((raters, *shape), np.uint8)
    axes = axes_mm(shape, spacing_mm)
    thickness = max(1, SLAB_VOXELS // (shape[0] * shape[1]))
    for slab in (slice(z, z + thickness) for z in range(0, shape[2], thickness)):
        grid = (axes[0], axes[1], axes[2][slab])
        signal, label_maps[..., slab] = paint(body, look, grid, 1.3 * pixel_mm, field_at(offsets_mm, look, grid))
        image[..., slab] = acquire(noise_rng, signal, look, grid)
    return image, label_maps
