"""How a body looks in CT and MR: tissue, bends, texture and noise."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Float32, UInt8
from scipy.ndimage import gaussian_filter1d

from medseg_diff.datasets.anatomy import Point, Structure, bounds, signed_distance

Modality = Literal["ct", "mr"]
Places = tuple[Float[np.ndarray, "_"], Float[np.ndarray, "_"], Float[np.ndarray, "_"]]
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


@dataclass(frozen=True)
class Look:
    """What differs between patients and scanners.

    Attributes:
        modality: CT in HU, MR on a scale of its own.
        half_mm: the field of view is +-half_mm.
        brightness: of each tissue, before noise.
        bends: control points of smooth shifts in mm, each [3, n, n, n], of the points where the body is looked up.
        reach_mm: the largest shift along each axis.
        texture: control points.
        bias: control points of the logarithm of MR's coil sensitivity.
        gain: of MR.

    """

    modality: Modality
    half_mm: Point
    brightness: dict[str, float]
    bends: tuple[np.ndarray, ...]
    reach_mm: Point
    texture: Float[np.ndarray, "_ _ _"]
    bias: Float[np.ndarray, "_ _ _"]
    gain: float


def draw_look(rng: np.random.Generator, half_mm: Point, modality: Modality) -> Look:
    """The look of one scan."""
    shares = ((5, 0.16), (12, 0.06))  # control points an axis, largest shift as a share of the field of view
    bends = tuple(rng.uniform(-share, share, (3, n, n, n)) * half_mm.reshape(3, 1, 1, 1) for n, share in shares)
    brightness = {tissue: value * rng.normal(1, 0.04) for tissue, value in BRIGHTNESS[modality].items()}
    texture = rng.normal(0, 1, (28, 28, 20))
    bias, gain = rng.normal(0, 0.6, (4, 4, 4)), 10 ** rng.uniform(0, 4)
    return Look(modality, half_mm, brightness, bends, half_mm * sum(s for _, s in shares), texture, bias, gain)


def paint(
    body: tuple[Structure, ...],
    look: Look,
    grid: Places,
    edge_mm: float,
    offsets_mm: Float32[np.ndarray, "maps x y z"],
) -> tuple[Float32[np.ndarray, "x y z"], UInt8[np.ndarray, "maps x y z"]]:
    """Signal and label maps of the bent body at the crossings of `grid` (mm); each map's borders lie offsets_mm out."""
    bent = sum(field_at(bend, look, grid) for bend in look.bends)
    points = np.stack(np.meshgrid(*grid, indexing="ij")).astype(np.float32) + bent
    signal = np.full(points.shape[1:], AIR[look.modality], np.float32)
    label_maps = np.zeros((len(offsets_mm), *signal.shape), np.uint8)
    for structure in body:
        softest_mm = edge_mm * structure.softness
        margin = look.reach_mm + softest_mm + structure.blend_mm + float(offsets_mm.max())
        distance = np.full(signal.shape, np.float32(np.inf))
        for part in structure.parts:
            low, high = bounds(part)
            box = tuple(
                slice(*np.searchsorted(axis, (a, b)))
                for axis, a, b in zip(grid, low - margin, high + margin, strict=True)
            )
            distance[box] = _union(distance[box], signed_distance(part, points[:, *box]), structure.blend_mm)
        share = np.clip(0.5 - distance / softest_mm, 0, 1)  # of the voxel that the structure fills
        signal += share * (np.float32(look.brightness[structure.tissue]) - signal)
        np.copyto(label_maps, structure.label, where=distance < (offsets_mm if structure.label else 0))
    return signal, label_maps


def acquire(
    rng: np.random.Generator, signal: Float32[np.ndarray, "x y z"], look: Look, grid: Places, noise: float = 1.0
) -> Float32[np.ndarray, "x y z"]:
    """The image of a signal: texture and noise (times `noise`), of MR besides coil sensitivity and gain."""
    texture = noise * field_at(look.texture, look, grid)
    if look.modality == "ct":
        return signal + 9 * texture + 13 * noise * _grain(rng, signal.shape)
    signal = signal * ((1 + 0.12 * texture) * np.exp(field_at(look.bias, look, grid)))
    real, imaginary = 0.03 * noise * rng.standard_normal((2, *signal.shape), np.float32)
    return look.gain * np.hypot(signal + real, imaginary)  # Rician: the magnitude of complex noise


def field_at(knots: Float[np.ndarray, "*lead i j k"], look: Look, grid: Places) -> Float32[np.ndarray, "*lead x y z"]:
    """A cubic B-spline through a coarse lattice over the field of view, at the crossings of `grid` (mm)."""
    field = np.asarray(knots, np.float32)
    for axis, half_mm, count in zip(grid, look.half_mm, knots.shape[-3:], strict=True):
        where = (np.clip(axis / half_mm, -1, 1) + 1) / 2 * (count - 3)
        cell = np.minimum(where.astype(int), count - 4)
        t = where - cell
        weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]) / 6
        matrix = np.zeros((len(axis), count), np.float32)
        for i in range(4):
            matrix[np.arange(len(axis)), cell + i] = weights[i]
        field = np.tensordot(field, matrix, axes=(-3, 1))  # takes the first of three axes, appends the new one
    return field


def axes_mm(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> Places:
    """Places of the voxels along each axis, 0 in the middle."""
    x, y, z = ((np.arange(n) - (n - 1) / 2) * step for n, step in zip(shape, spacing_mm, strict=True))
    return x, y, z


def _union(a: np.ndarray, b: np.ndarray, blend_mm: float) -> np.ndarray:
    """Minimum of two distances, rounded where they differ by less than blend_mm."""
    lowest = np.minimum(a, b)
    if not blend_mm:
        return lowest
    return lowest - np.maximum(blend_mm - np.abs(a - b), 0) ** 2 / (4 * blend_mm)


def _grain(rng: np.random.Generator, shape: tuple[int, ...]) -> Float32[np.ndarray, "x y z"]:
    """The noise of CT: correlated within a slice, of standard deviation 1."""
    noise = rng.standard_normal(shape, np.float32)
    for axis in (0, 1):
        noise = gaussian_filter1d(noise, 0.7, axis=axis)
    return noise / noise.std()
