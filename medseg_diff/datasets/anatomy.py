"""The bodies of phantoms: structures made of ellipsoids and tubes, in mm about the centre of the field of view."""

from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
from jaxtyping import Float

Point = Float[np.ndarray, "3"]


@dataclass(frozen=True)
class Ellipsoid:
    """An infinite radius makes it a cylinder; power 4 makes it boxy."""

    centre: Point
    radii: Point
    power: int = 2


@dataclass(frozen=True)
class Tube:
    """From end to end, tapering."""

    start: Point
    end: Point
    start_radius: float
    end_radius: float


@dataclass(frozen=True)
class Structure:
    """The union of its parts, of one tissue; label 0 is background."""

    tissue: str
    parts: tuple[Ellipsoid | Tube, ...]
    label: int = 0
    blend_mm: float = 0.0  # how far parts melt into each other
    softness: float = 1.0  # width of its edge in the image, times that of the others


def bounds(part: Ellipsoid | Tube) -> tuple[Point, Point]:
    """Lowest and highest corner of the box around a part, in mm."""
    if isinstance(part, Ellipsoid):
        return part.centre - part.radii, part.centre + part.radii
    radius = max(part.start_radius, part.end_radius)
    return np.minimum(part.start, part.end) - radius, np.maximum(part.start, part.end) + radius


def signed_distance(part: Ellipsoid | Tube, points: Float[np.ndarray, "3 x y z"]) -> Float[np.ndarray, "x y z"]:
    """Negative inside, in mm; of an ellipsoid to first order: its level function over the length of its gradient."""
    if isinstance(part, Tube):
        axis, length = (part.end - part.start).tolist(), float(np.linalg.norm(part.end - part.start))
        offsets = [values - start for values, start in zip(points, part.start.tolist(), strict=True)]
        along = np.clip(sum(a * offset for a, offset in zip(axis, offsets, strict=True)) / length**2, 0, 1)
        square = sum((offset - a * along) ** 2 for a, offset in zip(axis, offsets, strict=True))
        return np.sqrt(square) - (part.start_radius + (part.end_radius - part.start_radius) * along)
    level, gradient = np.zeros((2, *points.shape[1:]), np.float32)
    for values, centre, radius in zip(points, part.centre.tolist(), part.radii.tolist(), strict=True):
        if radius < np.inf:
            ratio = ((values - centre) / radius) ** 2
            gradient += ratio ** (part.power - 1) / radius**2
            level += ratio ** (part.power // 2)
    root = np.maximum(level, 1e-6) ** (1 / part.power)
    distance = (root - 1) * root ** (part.power - 1) / np.sqrt(np.maximum(gradient, 1e-12))
    return np.maximum(distance, -part.radii.min())  # no point lies deeper; at the centre the gradient is zero


def grow_vessels(start: Point, ends: Float[np.ndarray, "leaves 3"], radius: float) -> tuple[Tube, ...]:
    """A tree from the start to all ends; at each fork the cubes of the radii add up (Murray 1926, PNAS 12:207)."""
    if len(ends) == 1:
        return (Tube(start, ends[0], radius, 0.7 * radius),)
    fork = start + 0.5 * (ends.mean(0) - start)
    order = np.argsort(ends[:, np.argmax(ends.std(0))])
    halves = np.array_split(ends[order], 2)
    branches = [
        tube for half in halves for tube in grow_vessels(fork, half, radius * (len(half) / len(ends)) ** (1 / 3))
    ]
    return (Tube(start, fork, radius, radius), *branches)


def draw_body(rng: np.random.Generator, half_mm: Point) -> tuple[Structure, ...]:
    """An abdomen that fills a field of view of +-half_mm (axes to right, front, head), painted from first to last.

    Labels: 1 organ (a liver), 2 vessel (the tree in it), 3 lesion. Spleen, great vessels, bowel and kidneys have like
    intensities and no label, so that place and shape decide, not brightness.
    """
    scale = rng.uniform(0.92, 1.0, 3) * half_mm
    thin = float(min(scale[0], scale[1]))

    def at(x: float, y: float, z: float, wander: float = 0.03) -> Point:
        return (np.array([x, y, z]) + rng.uniform(-wander, wander, 3)) * scale

    def egg(centre: Point, *radii: float, power: int = 2, vary: float = 0.1) -> Ellipsoid:
        return Ellipsoid(centre, np.array(radii) * rng.uniform(1 - vary, 1 + vary, 3) * scale, power)

    endless = np.inf
    middle = np.zeros(3)
    trunk = [
        Structure("fat", (egg(middle, 0.93, 0.8, endless, vary=0.03),)),
        Structure("muscle", (egg(middle, 0.84, 0.7, endless, vary=0.02),)),
        Structure("fat", (egg(np.array([0, 0.04, 0]) * scale, 0.77, 0.61, endless, vary=0.02),)),
        Structure("muscle", tuple(egg(at(side * 0.24, -0.56, 0.0), 0.18, 0.13, endless) for side in (-1, 1))),
        Structure("muscle", tuple(egg(at(side * 0.26, -0.38, 0.0), 0.09, 0.1, endless) for side in (-1, 1))),
    ]
    right = egg(at(0.4, 0.06, 0.1, 0.06), 0.33, 0.46, 0.66, vary=0.15)
    left = egg(at(0.0, 0.32, 0.22, 0.06), 0.34, 0.18, 0.38, vary=0.2)
    tail = egg(at(0.5, -0.08, -0.35, 0.08), 0.2, 0.28, 0.42, vary=0.2)
    hilum = at(0.14, 0.02, 0.0)
    leaves = np.concatenate([_within(rng, right, 9, 0.85), _within(rng, left, 4, 0.8), _within(rng, tail, 3, 0.8)])
    lesions = [
        Ellipsoid(centre, thin * rng.uniform(0.1, 0.22) * rng.uniform(0.75, 1.3, 3))
        for centre in _within(rng, right, int(rng.integers(1, 4)), 0.6)
    ]
    liver = [
        Structure("organ", (right, left, tail), 1, blend_mm=0.15 * thin),
        Structure("vessel", (Tube(at(0.02, -0.05, -0.5), hilum, 0.09 * thin, 0.09 * thin),), 2),
        Structure("vessel", grow_vessels(hilum, leaves, 0.09 * thin), 2),
        Structure("lesion", tuple(lesions), 3),
    ]
    spleen = egg(at(-0.55, -0.18, 0.2, 0.05), 0.17, 0.3, 0.42, vary=0.2)
    kidneys = [(side, egg(at(side * 0.44, -0.38, -0.4, 0.05), 0.15, 0.14, 0.4)) for side in (-1, 1)]
    stomach = egg(at(-0.36, 0.24, 0.45, 0.06), 0.26, 0.22, 0.4, vary=0.2)
    places = product((-0.4, -0.15, 0.1, 0.35), (0.05, 0.38), (-0.95, -0.6, -0.25))
    loops = [egg(at(x, y, z, 0.09), 0.15, 0.14, 0.19, vary=0.3) for x, y, z in places if x < 0 or z < -0.8]
    loops.append(stomach)
    rise = np.array([0, 0.45, 0])
    gas = [Ellipsoid(loop.centre + rise * loop.radii, 0.45 * loop.radii) for loop in loops[::4]]
    others = [
        Structure("organ", (spleen,)),
        Structure("lesion", (Ellipsoid(_within(rng, spleen, 1, 0.4)[0], thin * rng.uniform(0.06, 0.1, 3)),)),
        *(Structure("kidney", (kidney,)) for _, kidney in kidneys),
        *(
            Structure("fat", (Ellipsoid(kidney.centre - [side * 0.06 * scale[0], 0, 0], 0.45 * kidney.radii),))
            for side, kidney in kidneys
        ),
        *(Structure("muscle" if i % 3 else "bowel", (loop,)) for i, loop in enumerate(loops)),
        Structure("gas", tuple(gas)),
        Structure(
            "lesion", (egg(at(0.22, 0.26, -0.35, 0.05), 0.1, 0.11, 0.2),)
        ),  # a gallbladder, as bright as a lesion
        Structure("vessel", grow_vessels(at(-0.06, -0.1, 0.0), _within(rng, stomach, 7, 1.3), 0.07 * thin)),
        Structure("vessel", (egg(at(-0.07, -0.23, 0.0), 0.075, 0.075, endless),)),
        Structure("vessel", (egg(at(0.11, -0.23, 0.0), 0.085, 0.07, endless),)),
    ]
    return tuple(trunk + liver + others + _skeleton(rng, scale, thin))


def _within(rng: np.random.Generator, part: Ellipsoid, count: int, fill: float) -> Float[np.ndarray, "count 3"]:
    """Points spread evenly in the ellipsoid, shrunk by the factor `fill`."""
    direction = rng.normal(size=(count, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    return part.centre + part.radii * direction * fill * rng.uniform(size=(count, 1)) ** (1 / 3)


def _skeleton(rng: np.random.Generator, scale: Point, thin: float) -> list[Structure]:
    """Vertebrae with arch, canal and processes, and ribs that slope down from the spine."""
    structures = []
    levels = np.arange(-1.2, 1.3, 0.4) + rng.uniform(-0.2, 0.2)
    spine = np.array([0, -0.46, 0]) * scale
    structures.append(Structure("disc", (Ellipsoid(spine, np.array([0.16, 0.12, np.inf]) * scale),)))
    for level in levels * scale[2]:
        centre = spine + np.array([0, 0, level])
        arch = centre - np.array([0, 0.17, 0]) * scale
        processes = [
            Tube(arch, arch + np.array(way) * scale, 0.045 * thin, 0.03 * thin)
            for way in ([0.0, -0.14, -0.05], [0.17, -0.03, 0.02], [-0.17, -0.03, 0.02])
        ]
        body = Ellipsoid(centre, np.array([0.17, 0.13, 0.16]) * scale, power=4)
        ring = Ellipsoid(arch, np.array([0.1, 0.1, 0.12]) * scale)
        structures.append(Structure("cortex", (body, ring, *processes)))
        structures.append(Structure("marrow", (Ellipsoid(centre, body.radii - 0.03 * thin, power=4),)))
    canal = Ellipsoid(spine - np.array([0, 0.17, 0]) * scale, np.array([0.065, 0.06, np.inf]) * scale)
    structures.append(Structure("fluid", (canal,)))
    angle = np.linspace(0.1, 0.8, 10) * np.pi
    for side in (-1, 1):
        for level in levels:
            arc = np.stack([side * 0.805 * np.sin(angle), -0.655 * np.cos(angle), level - 0.35 * angle / np.pi], axis=1)
            ribs = [Tube(a, b, 0.035 * thin, 0.035 * thin) for a, b in pairwise(arc * scale)]
            structures.append(Structure("cortex", tuple(ribs)))
    return structures
