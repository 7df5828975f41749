"""Phantoms whose raters disagree by a known law: abdomens with soft borders and doubtful lesions.

Given the scan, these choices are independent:

- the organ is drawn tight, middle or wide (a rater's style) with the probabilities STYLES, the same for every case;
- the lesion is drawn with probability p(contrast), and then small, medium or large with the probabilities SIZES;
- each of four nodules is drawn, in one size, with a probability p(contrast) of its own.

p rises linearly from 0 at the lower contrast of CONTRAST to 1 at the higher. The contrast is measured in the stored
image: how much darker the core of the lesion is than the organ around it, in HU for CT and as a share of it for MR
(see `contrast`). So p is no hidden number that noise blurs. Where exactly the borders of the options run has to be
guessed from a noisy image, as everywhere, to a part of a voxel.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Float32, Num
from scipy.ndimage import binary_dilation, distance_transform_edt

from medseg_diff.datasets.ambiguous import Factor, Truth, sample_masks, write_truth
from medseg_diff.datasets.anatomy import draw_body
from medseg_diff.datasets.phantom import centred_affine, write_files, write_set
from medseg_diff.datasets.rendering import Look, Modality, acquire, axes_mm, draw_look, paint

LABELS = {0: "background", 1: "organ", 2: "lesion", 3: "nodule"}
STYLES = {"tight": 0.3, "middle": 0.45, "wide": 0.25}
SIZES = {"small": 0.3, "medium": 0.4, "large": 0.3}
CONTRAST = {"ct": (15.0, 75.0), "mr": (0.12, 0.52)}
SPACING_MM = (1.5, 1.5, 2.0)
STYLE_MM = 1.3  # from the border of one style to the next
LESION_MM = (3.2, 4.3, 5.4)
NODULE_MM = 2.6
NODULES = 4
EDGE_MM = 1.2  # from the full contrast of a nodule to none
STRETCH = 1.1  # of a lesion along an axis, at most
NOISE = 0.5  # times that of the other phantom


def make_ambiguous_phantom(folder: Path, cases: int, modality: Modality, raters: int, seed: int) -> None:
    """Write a data set in the Decathlon layout, whole or not at all, with the law of each case under truth/.

    Each rater's label file is an independent draw of the law. Case i depends on seed and i alone; its image and truth
    do not depend on the number of raters. All grids have the same spacing and axes to right, front and head.
    Raises UserError for a folder that is not empty or cannot be written.
    """
    about = {
        "name": "AmbiguousPhantom",
        "description": f"Synthetic abdomens with a known law of masks, drawn by medseg-diff with seed {seed}",
        "labels": LABELS,
        "truth": "truth",
    }
    write_set(folder, cases, modality, about, partial(_write_case, modality=modality, raters=raters, seed=seed))


def draw_ambiguous_case(
    rng: np.random.Generator, shape: tuple[int, int, int], modality: Modality
) -> tuple[Num[np.ndarray, "x y z"], Truth]:
    """A scan as it is stored (whole HU for CT) on voxels of SPACING_MM, and the law of its masks."""
    while True:  # until an organ has room for all lesions
        signal, organs, look = _draw_organ(rng, shape, modality)
        lesions = _place_lesions(rng, organs[0])
        if lesions is not None:
            break
    low, high = CONTRAST[modality]
    scale = look.brightness["organ"] if modality == "mr" else 1.0
    for distance_mm, (inner_mm, outer_mm) in lesions:
        share = np.clip((outer_mm - distance_mm) / (outer_mm - inner_mm), 0, 1)
        signal -= (share * scale * rng.uniform(low, high)).astype(np.float32)
    image = acquire(rng, signal, look, axes_mm(shape, SPACING_MM), NOISE)
    stored = np.round(image).astype(np.int16) if modality == "ct" else image

    masks = [_balls(distance_mm, LESION_MM if i == 0 else (NODULE_MM,)) for i, (distance_mm, _) in enumerate(lesions)]
    factors = [Factor("organ", 1, tuple(STYLES), np.array(list(STYLES.values())), organs)]
    for i, mask in enumerate(masks):
        others = np.any([other[-1] for j, other in enumerate(masks) if j != i], axis=0)
        measured = contrast(stored, mask, organs[0] & ~binary_dilation(others), modality)
        p = float(np.clip((measured - low) / (high - low), 0, 1))
        sizes = SIZES if i == 0 else {"present": 1.0}
        options, probabilities = ("absent", *sizes), np.array([1 - p, *(p * share for share in sizes.values())])
        name, label = ("lesion", 2) if i == 0 else (f"nodule {i}", 3)
        factors.append(Factor(name, label, options, probabilities, mask))
    return stored, Truth(LABELS, float(np.prod(SPACING_MM)) / 1000, tuple(factors))


def contrast(
    image: Num[np.ndarray, "x y z"],
    masks: Bool[np.ndarray, "options x y z"],
    organ: Bool[np.ndarray, "x y z"],
    modality: Modality,
) -> float:
    """How much darker a lesion's smallest mask is than the organ around its largest, in the mean; masks[0] is absent.

    Around: in the second layer of voxels (across faces), where it is `organ`. CT in HU, MR as a share of the organ.
    """
    around = binary_dilation(masks[-1], iterations=2) & ~binary_dilation(masks[-1]) & organ
    inside, outside = float(image[masks[1]].mean()), float(image[around].mean())
    return outside - inside if modality == "ct" else 1 - inside / outside


def _write_case(folder: Path, i: int, *, modality: Modality, raters: int, seed: int) -> dict[str, str | list[str]]:
    rng, rater_rng = np.random.default_rng([seed, i]).spawn(2)
    shape = (int(rng.integers(44, 49)), int(rng.integers(44, 49)), int(rng.integers(22, 25)))
    image, truth = draw_ambiguous_case(rng, shape, modality)
    name = f"ambiguous_{i:03}"
    (folder / "truth").mkdir(exist_ok=True)
    write_truth(truth, folder / f"truth/{name}.json")
    drawn = sample_masks(truth, raters, rater_rng)
    return write_files(folder, name, image, drawn, centred_affine(shape, SPACING_MM), "RAS")


def _draw_organ(
    rng: np.random.Generator, shape: tuple[int, int, int], modality: Modality
) -> tuple[Float32[np.ndarray, "x y z"], Bool[np.ndarray, "styles x y z"], Look]:
    """Signal of a body without lesions or vessels in the organ, the organ's masks from tight to wide, the look."""
    half_mm = np.array(shape) * SPACING_MM / 2
    body = draw_body(rng, half_mm)
    kept = tuple(replace(part, softness=2.0 if part.label else 1.0) for part in body if part.label <= 1)
    look = draw_look(rng, half_mm, modality)
    pixel_mm = float(np.cbrt(np.prod(SPACING_MM)))
    offsets_mm = np.full((3, *shape), np.array([-STYLE_MM, 0, STYLE_MM]).reshape(3, 1, 1, 1), np.float32)
    signal, organs = paint(kept, look, axes_mm(shape, SPACING_MM), 1.1 * pixel_mm, offsets_mm)
    return signal, organs == 1, look


def _place_lesions(
    rng: np.random.Generator, organ: Bool[np.ndarray, "x y z"]
) -> list[tuple[Float[np.ndarray, "x y z"], tuple[float, float]]] | None:
    """The lesion, then the nodules: distance from the centre in mm, and from where to where its contrast falls off.

    None where they do not fit into the organ side by side.
    """
    points = np.stack(np.meshgrid(*axes_mm(organ.shape, SPACING_MM), indexing="ij"))
    free_mm = distance_transform_edt(organ, SPACING_MM) - np.linalg.norm(SPACING_MM) / 4
    placed = []
    for inner_mm, outer_mm in ((LESION_MM[0], LESION_MM[-1]), *[(NODULE_MM, NODULE_MM + EDGE_MM)] * NODULES):
        room = np.argwhere(free_mm > STRETCH * outer_mm)
        if not len(room):
            return None
        centre = points[:, *rng.choice(room)] + rng.uniform(-0.25, 0.25, 3) * SPACING_MM
        apart_mm = points - centre.reshape(3, 1, 1, 1)
        stretch = rng.uniform(1 / STRETCH, STRETCH, (3, 1, 1, 1))
        placed.append((np.linalg.norm(apart_mm / stretch, axis=0), (inner_mm, outer_mm)))
        free_mm = np.minimum(free_mm, np.linalg.norm(apart_mm, axis=0) - STRETCH * outer_mm)
    return placed


def _balls(distance_mm: Float[np.ndarray, "x y z"], radii_mm: tuple[float, ...]) -> Bool[np.ndarray, "options x y z"]:
    """Absent, then a ball of each radius."""
    return np.stack([distance_mm < radius for radius in (0.0, *radii_mm)])
