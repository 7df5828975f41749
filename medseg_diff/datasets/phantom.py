"""Synthetic labelled scans: an abdomen as CT or MR shows it, for a first training run and for tests."""

import json
import secrets
import shutil
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Float32, UInt8
from scipy.ndimage import gaussian_filter1d
from scipy.spatial.transform import Rotation

from medseg_diff.console import progress
from medseg_diff.datasets.anatomy import Structure, bounds, draw_body, signed_distance
from medseg_diff.errors import UserError
from medseg_diff.scans.geometry import reoriented
from medseg_diff.scans.write import write_volume

Modality = Literal["ct", "mr"]
LABELS = {0: "background", 1: "organ", 2: "vessel", 3: "lesion"}
# Close neighbours on purpose: organ and kidney, lesion and muscle and bowel.
BRIGHTNESS: dict[str, dict[str, float]] = {
    "ct": {
        "fat": -95, "muscle": 62, "organ": 105, "vessel": 170, "lesion": 58, "kidney": 125, "bowel": 72,
        "gas": -880, "cortex": 620, "marrow": 230, "disc": 85, "fluid": 20,
    },
    "mr": {
        "fat": 0.9, "muscle": 0.36, "organ": 0.52, "vessel": 0.78, "lesion": 0.33, "kidney": 0.46,
        "bowel": 0.4, "gas": 0.02, "cortex": 0.08, "marrow": 0.62, "disc": 0.4, "fluid": 0.2,
    },
}  # fmt: skip
AIR = {"ct": -1000.0, "mr": 0.01}
GRIDS = (("RAS", 0.0), ("LPS", 0.0), ("LAS", 14.0), ("SRA", 0.0), ("PIR", -9.0))  # axis order, rotation in degrees
SLAB_VOXELS = 4_000_000


def draw_case(
    rng: np.random.Generator, shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], modality: Modality
) -> tuple[Float32[np.ndarray, "x y z"], UInt8[np.ndarray, "x y z"]]:
    """One scan and its label map (see LABELS), axes to right, front and head; CT in HU, MR on a scale of its own."""
    image, (label_map,) = _draw(rng, shape, spacing_mm, modality, raters=1)
    return image, label_map


def make_phantom(folder: Path, cases: int, modality: Modality, raters: int, seed: int) -> None:
    """Write a data set in the Decathlon layout, whole or not at all.

    Case i depends on seed and i alone. The grids differ in shape, spacing and axis order, and some are oblique.
    Raises UserError for a folder that is not empty or cannot be written.
    """
    place = folder.resolve()
    try:
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise UserError(folder, "it exists and is not empty", "Name a new folder, or empty this one.")
        unfinished = place.with_name(f".{secrets.token_hex(8)}")
        try:
            _write_set(unfinished, cases, modality, raters, seed)
            unfinished.rename(place)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        what = f"it cannot be written ({error.strerror or error})"
        raise UserError(folder, what, "Free some space, or choose a folder that can be written to.") from error


def _write_set(folder: Path, cases: int, modality: Modality, raters: int, seed: int) -> None:
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    training = []
    with progress("drawing cases", cases) as advance:
        for i in range(cases):
            training.append(_write_case(folder, i, modality, raters, seed))
            advance()
    description = {
        "name": "Phantom",
        "description": f"Synthetic abdomens, drawn by medseg-diff with seed {seed}",
        "licence": "CC0-1.0",
        "tensorImageSize": "3D",
        "modality": {"0": "CT" if modality == "ct" else "MRI"},
        "labels": LABELS,
        "numTraining": cases,
        "training": training,
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=1) + "\n")


def _write_case(folder: Path, i: int, modality: Modality, raters: int, seed: int) -> dict[str, str | list[str]]:
    """Returns its entry in dataset.json."""
    rng = np.random.default_rng([seed, i])
    shape = (int(rng.integers(44, 53)), int(rng.integers(44, 53)), int(rng.integers(24, 33)))
    spacing_mm = (0.9, 0.9, float(rng.choice([1.5, 2.0, 3.0])))
    image, label_maps = _draw(rng, shape, spacing_mm, modality, raters)
    order, degrees = GRIDS[i % len(GRIDS)]
    affine = _affine(shape, spacing_mm, degrees)
    stored = np.round(image).astype(np.int16) if modality == "ct" else image
    name = f"phantom_{i:03}.nii.gz"
    labels = [name] if raters == 1 else [f"phantom_{i:03}_rater{r + 1}.nii.gz" for r in range(raters)]
    files = {folder / "imagesTr" / name: stored}
    files |= {folder / "labelsTr" / label: label_map for label, label_map in zip(labels, label_maps, strict=True)}
    for path, volume in files.items():
        turned, turned_affine = reoriented(volume, affine, order)
        write_volume(turned[None], turned_affine, path)
    paths = [f"./labelsTr/{label}" for label in labels]
    return {"image": f"./imagesTr/{name}", "label": paths if raters > 1 else paths[0]}


def _draw(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    modality: Modality,
    raters: int,
) -> tuple[Float32[np.ndarray, "x y z"], list[UInt8[np.ndarray, "x y z"]]]:
    """The image is the same for any number of raters; several draw every border a smooth distance off."""
    body_rng, look_rng, noise_rng, rater_rng = rng.spawn(4)
    half_mm = np.array(shape) * spacing_mm / 2
    body = draw_body(body_rng, half_mm)
    shares = ((5, 0.16), (12, 0.06))  # control points an axis, largest shift as a share of the field of view
    bends = [look_rng.uniform(-share, share, (3, n, n, n)) * half_mm.reshape(3, 1, 1, 1) for n, share in shares]
    reach_mm = half_mm * sum(share for _, share in shares)
    brightness = {tissue: value * look_rng.normal(1, 0.04) for tissue, value in BRIGHTNESS[modality].items()}
    texture = look_rng.normal(0, 1, (28, 28, 20))
    bias, gain = look_rng.normal(0, 0.6, (4, 4, 4)), 10 ** look_rng.uniform(0, 4)
    pixel_mm = float(np.cbrt(np.prod(spacing_mm)))
    offsets_mm = rater_rng.normal(0, 1.2 * pixel_mm if raters > 1 else 0, (raters, 7, 7, 7))

    image = np.empty(shape, np.float32)
    label_maps = np.zeros((raters, *shape), np.uint8)
    axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(shape, spacing_mm, strict=True)]
    thickness = max(1, SLAB_VOXELS // (shape[0] * shape[1]))
    for slab in (slice(z, z + thickness) for z in range(0, shape[2], thickness)):
        grid = (axes[0], axes[1], axes[2][slab])
        field = partial(_smooth_field, places=[axis / half for axis, half in zip(grid, half_mm, strict=True)])
        points = np.stack(np.meshgrid(*grid, indexing="ij")).astype(np.float32) + sum(map(field, bends))
        signal, painted = _paint(
            body, brightness, AIR[modality], points, grid, reach_mm, 1.3 * pixel_mm, field(offsets_mm)
        )
        label_maps[..., slab] = painted
        if modality == "ct":
            image[..., slab] = signal + 9 * field(texture) + 13 * _grain(noise_rng, signal.shape)
        else:
            signal *= (1 + 0.12 * field(texture)) * np.exp(field(bias))
            noise = 0.03 * noise_rng.standard_normal((2, *signal.shape), np.float32)
            image[..., slab] = gain * np.hypot(signal + noise[0], noise[1])  # Rician: the magnitude of complex noise
    return image, list(label_maps)


def _paint(
    body: tuple[Structure, ...],
    brightness: dict[str, float],
    air: float,
    points: Float32[np.ndarray, "3 x y z"],
    grid: tuple[np.ndarray, ...],
    reach_mm: Float[np.ndarray, "3"],
    edge_mm: float,
    offsets_mm: Float32[np.ndarray, "raters x y z"],
) -> tuple[Float32[np.ndarray, "x y z"], UInt8[np.ndarray, "raters x y z"]]:
    """Signal and labels of the body at bent `points`: each lies within reach_mm of its place on the grid."""
    signal = np.full(points.shape[1:], air, np.float32)
    label_maps = np.zeros((len(offsets_mm), *signal.shape), np.uint8)
    for structure in body:
        margin = reach_mm + edge_mm + structure.blend_mm + float(offsets_mm.max())
        distance = np.full(signal.shape, np.float32(np.inf))
        for part in structure.parts:
            low, high = bounds(part)
            box = tuple(
                slice(*np.searchsorted(axis, (a, b)))
                for axis, a, b in zip(grid, low - margin, high + margin, strict=True)
            )
            distance[box] = _union(distance[box], signed_distance(part, points[:, *box]), structure.blend_mm)
        share = np.clip(0.5 - distance / edge_mm, 0, 1)  # of the voxel that the structure fills
        signal += share * (np.float32(brightness[structure.tissue]) - signal)
        np.copyto(label_maps, structure.label, where=distance < (offsets_mm if structure.label else 0))
    return signal, label_maps


def _union(a: np.ndarray, b: np.ndarray, blend_mm: float) -> np.ndarray:
    """Minimum of two distances, rounded where they differ by less than blend_mm."""
    lowest = np.minimum(a, b)
    if not blend_mm:
        return lowest
    return lowest - np.maximum(blend_mm - np.abs(a - b), 0) ** 2 / (4 * blend_mm)


def _smooth_field(
    knots: Float[np.ndarray, "*lead i j k"], places: list[Float[np.ndarray, "_"]]
) -> Float32[np.ndarray, "*lead x y z"]:
    """A cubic B-spline through a coarse lattice over [-1, 1]^3, at the crossings of the places on each axis."""
    field = np.asarray(knots, np.float32)
    for place, count in zip(places, knots.shape[-3:], strict=True):
        where = (np.clip(place, -1, 1) + 1) / 2 * (count - 3)
        cell = np.minimum(where.astype(int), count - 4)
        t = where - cell
        weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]) / 6
        matrix = np.zeros((len(place), count), np.float32)
        for i in range(4):
            matrix[np.arange(len(place)), cell + i] = weights[i]
        field = np.tensordot(field, matrix, axes=(-3, 1))  # takes the first of three axes, appends the new one
    return field


def _grain(rng: np.random.Generator, shape: tuple[int, ...]) -> Float32[np.ndarray, "x y z"]:
    """The noise of CT: correlated within a slice, of standard deviation 1."""
    noise = rng.standard_normal(shape, np.float32)
    for axis in (0, 1):
        noise = gaussian_filter1d(noise, 0.7, axis=axis)
    return noise / noise.std()


def _affine(shape: tuple[int, ...], spacing_mm: tuple[float, ...], degrees: float) -> Float[np.ndarray, "4 4"]:
    """Voxel -> world of a grid tilted about two axes, its centre away from the origin."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xz", [degrees, degrees / 2], degrees=True).as_matrix() * spacing_mm
    affine[:3, 3] = [12, -30, 55] - affine[:3, :3] @ (np.array(shape) - 1) / 2
    return affine
