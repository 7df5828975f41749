"""31-43: grids that cannot be, are unusual, or are larger than the machine."""

import io
import itertools
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff
from scipy.ndimage import affine_transform

from bad_inputs.case import Case, Maker, Volume, mask_of, refused, same, warned
from bad_inputs.nifti import AFFINE, GOOD, file, nifti, zeros
from medseg_diff import machine

SAMPLE = Path(__file__).resolve().parents[2] / "data/sample/imagesTr/hippocampus_001.nii.gz"
SHIPPED = ("--model", "hippocampus")
SHEAR = np.eye(4) + 0.1 * np.eye(4, k=1) * [0, 1, 0, 0]
ORIENTATIONS = [
    codes for order in itertools.permutations(("RL", "AP", "SI")) for codes in itertools.product(*order)
]  # fmt: skip


def overlap(mask: np.ndarray, other: np.ndarray) -> float:
    """Dice of all that is labelled, with the same label."""
    return 2 * np.count_nonzero((mask == other) & (mask > 0)) / (np.count_nonzero(mask) + np.count_nonzero(other))


def _scaled(factor: float) -> np.ndarray:
    return np.diag([factor, factor, factor, 1]) @ AFFINE


def sample() -> Volume:
    """A real scan, its axes along those of the body."""
    image = nib.load(SAMPLE)
    return Volume(np.asarray(image.dataobj).astype(np.float32), image.affine)


def save(volume: Volume, path: Path) -> Path:
    nib.save(nib.Nifti1Image(volume.values, volume.affine), path)
    return path


def _sheared() -> Volume:
    """The real scan as a tilted gantry would have taken it, its axes not at right angles."""
    volume = sample()
    depth = volume.values.shape[1] - 1
    affine = volume.affine @ SHEAR @ nib.affines.from_matvec(np.eye(3), [-SHEAR[0, 1] * depth / 2, 0, 0])
    onto = np.linalg.inv(volume.affine) @ affine
    return Volume(affine_transform(volume.values, onto, order=1), affine)


def _check_shear(folder: Path) -> None:
    """The real model's mask of the sheared scan is, place by place in the world, that of the straight one."""
    sheared, straight = _sheared(), sample()
    mask, warnings = mask_of(save(sheared, folder / "sheared.nii.gz"), *SHIPPED)
    assert "sheared" in warnings[0]
    expected, _ = mask_of(save(straight, folder / "straight.nii.gz"), *SHIPPED)
    onto = np.linalg.inv(straight.affine) @ sheared.affine
    expected = affine_transform(expected, onto, order=0)
    assert overlap(mask, expected) > 0.9


def _turned(codes: tuple[str, ...], volume: Volume) -> Volume:
    """The same volume, stored along other axes."""
    turn = nib.orientations.ornt_transform(nib.io_orientation(volume.affine), axcodes2ornt(codes))
    affine = volume.affine @ inv_ornt_aff(turn, volume.values.shape)
    return Volume(np.ascontiguousarray(apply_orientation(volume.values, turn)), affine)


def _check_orientations(folder: Path) -> None:
    """The real model's mask of the scan stored in each way is its mask of the first, stored in that way."""
    volume = sample()
    expected = Volume(mask_of(save(volume, folder / "RAS.nii.gz"), *SHIPPED)[0], volume.affine)
    assert len(ORIENTATIONS) == 48
    for codes in ORIENTATIONS:
        path = save(_turned(codes, volume), folder / f"{''.join(codes)}.nii.gz")
        mask, _ = mask_of(path, *SHIPPED)
        turned = _turned(codes, expected)
        np.testing.assert_array_equal(mask, turned.values)
        np.testing.assert_allclose(nib.load(path).affine, turned.affine)


def _kept(make_volume: Callable[[], Volume]) -> Maker:
    return lambda folder: save(make_volume(), folder / "a.nii.gz")


def _part(*sizes: int) -> Volume:
    return Volume(GOOD.values[tuple(slice(size) for size in sizes)], AFFINE)


def _small(number: int, what: str, *sizes: int) -> Case:
    part = _part(*sizes)
    return same(number, what, file("a.nii", nifti(part.values)), part, must="a mask of the same shape")


def _large(folder: Path) -> Path:
    """1024^3 zeros, all there."""
    return zeros(folder / "large.nii.gz", (1024, 1024, 1024))


def _check_large(folder: Path) -> None:
    """With 24 GB of memory it is refused by its header."""
    meminfo = folder / "meminfo"
    meminfo.write_text(f"MemAvailable: {24 * 10**6} kB\n")
    case = refused(43, "", _large, r"needs at least 25\.8 GB of memory, and 24\.\d GB are free\. Crop")
    with patch.object(machine, "_MEMINFO", meminfo):
        case.check(folder)


WITHOUT_CODES = nib.Nifti1Header.from_fileobj(io.BytesIO(nifti(sform_code=0, qform_code=0))).get_base_affine()

CASES = [
    refused(31, "a voxel size of NaN", file("a.nii", nifti(pixdim={2: np.nan})), "voxel size"),
    refused(32, "a voxel size of 0", file("a.nii", nifti(pixdim={3: 0})), "voxel size", must="refuse, no silent 1.0"),
    warned(
        33,
        "a negative voxel size",
        file("a.nii", nifti(pixdim={1: -0.7}, sform_code=0)),
        "negative voxel sizes",
        GOOD,
        must="warn, orientation kept",
    ),
    refused(
        34,
        "an affine that maps two axes onto one",
        file("a.nii", nifti(srow_x=[1, 1, 0, 0], srow_y=[1, 1, 0, 0], srow_z=[0, 0, 1, 0])),
        "singular",
    ),
    refused(34, "an affine of NaN", file("a.nii", nifti(srow_x=[np.nan, 0, 0, 0])), "NaN"),
    Case(
        35,
        "a sheared affine, real scan and model",
        "warn, resample, result on the scan's grid",
        _check_shear,
        _kept(_sheared),
        _sheared(),
    ),
    warned(
        36,
        "sform and qform disagree",
        file("a.nii", nifti(qoffset_x=5)),
        "disagree by up to .*: the sform is used",
        GOOD,
        must="warn, and say which is used",
    ),
    warned(
        37,
        "both form codes 0",
        file("a.nii", nifti(sform_code=0, qform_code=0)),
        "orientation and position are unknown",
        Volume(GOOD.values, WITHOUT_CODES),
    ),
    Case(
        38,
        "each of the 48 orientations, real scan and model",
        "the mask of the RAS scan, re-oriented, voxel for voxel",
        _check_orientations,
        _kept(lambda: _turned(("I", "R", "P"), sample())),
        _turned(("I", "R", "P"), sample()),
        slow=True,
    ),
    refused(39, "voxels of 0.01 mm", file("a.nii", nifti(affine=np.diag([0.01, 1, 1, 1]))), "from 0.02 to 50 mm"),
    refused(39, "voxels of 100 mm", file("a.nii", nifti(affine=np.diag([1, 100, 1, 1]))), "from 0.02 to 50 mm"),
    warned(
        40,
        "the unit is the metre",
        file("a.nii", nifti(affine=_scaled(1e-3), xyzt_units=1)),
        "metre; it was converted to mm",
        GOOD,
        must="convert, warn",
    ),
    warned(
        40,
        "the unit is the micrometre",
        file("a.nii", nifti(affine=_scaled(1e3), xyzt_units=3)),
        "micrometre; it was converted to mm",
        GOOD,
        must="convert, warn",
    ),
    _small(41, "one voxel thick along x", 1, 10, 8),
    _small(41, "one voxel thick along z", 12, 10, 1),
    _small(42, "3 x 3 x 3 voxels", 3, 3, 3),
    Case(
        43,
        "1024^3 voxels with 24 GB of memory",
        "tiled, or refused before the memory is claimed",
        _check_large,
        _large,
        Volume(np.zeros((1024, 1024, 1024), np.uint8), AFFINE),
    ),
]
