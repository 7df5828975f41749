"""44-58: voxels that are not numbers, are no gray values, or lie on a scale that the model was not trained on."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from conftest import untrained

from bad_inputs.case import Case, Volume, call, mask_of, refused, same, warned
from bad_inputs.geometry import SHIPPED, overlap, sample, save
from bad_inputs.nifti import AFFINE, GOOD, file, nifti

CHANNELS = ("T1", "FLAIR")


def _marked(value: float) -> Volume:
    values = GOOD.values.copy()
    values[1, 2, 3] = value
    return Volume(values, AFFINE)


def _empty(number: int, what: str, value: float) -> Case:
    """An empty mask, a warning, and numbers in the report: `json` refuses NaN when it is written."""
    volume = Volume(np.full(GOOD.values.shape, value, np.float32), AFFINE)

    def check(folder: Path) -> None:
        mask, warnings = mask_of(make(folder))
        assert not mask.any()
        assert f"every voxel has the same value, {value:g}" in warnings[0]
        assert "NaN" not in Path("out/a_report.json").read_text()

    make = file("a.nii", nifti(volume.values))
    return Case(number, what, "empty mask, warn, no NaN", check, make, volume)


def _check_huge(folder: Path) -> None:
    """The mask is that of the same scan on a scale that fits, but for rounding."""
    mask, warnings = mask_of(_huge(folder))
    assert "the values are huge" in warnings[0]
    assert mask.any()
    expected, _ = mask_of(save(GOOD, folder / "plain.nii.gz"))
    assert np.mean(mask == expected) > 0.99


def _check_scale(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def check(folder: Path) -> None:
        volume = sample()
        expected, _ = mask_of(save(volume, folder / "scan.nii.gz"), *SHIPPED)
        changed = Volume(change(volume.values), volume.affine)
        mask, _ = mask_of(save(changed, folder / "changed.nii.gz"), *SHIPPED)
        assert overlap(mask, expected) > 0.995

    return check


def _check_channels(folder: Path) -> None:
    """Channels that are named are held against the model's; unnamed ones are taken in its order, which it says."""
    path = TWO_CHANNELS(folder)
    model = untrained(folder / "two.safetensors", channels=CHANNELS)
    command = ["segment", path, "--model", model, "--out", "out", "--save", "report", "--samples", 2]
    code, _, err = call(*command, "--channels", "FLAIR,T1")
    assert code == 2
    assert re.search(r"--channels FLAIR,T1: .*T1,FLAIR.*\. [A-Z]", err)
    assert not Path("out").exists()
    assert call(*command, "--channels", "T1,FLAIR")[0] == 0
    code, _, err = call(*command)
    assert code == 0
    assert "channels are taken as T1,FLAIR" in err


def _typed(what: str, dtype: str) -> Case:
    return same(52, f"voxels of {what}", file("a.nii", nifti(GOOD.values.astype(dtype))), GOOD)


HUGE = Volume(GOOD.values.astype(np.float64) * 1e306, AFFINE)
MILD = Volume(10 - 0.5 * GOOD.values, AFFINE)
FRAMES = np.stack([GOOD.values, GOOD.values + 1, GOOD.values + 2], -1)
TWO_CHANNELS = file("a.nii", nifti(FRAMES[..., :2]))
_huge = file("huge.nii", nifti(HUGE.values))

CASES = [
    _empty(44, "every voxel 0", 0.0),
    _empty(45, "every voxel 5", 5.0),
    warned(
        46,
        "one voxel NaN",
        file("a.nii", nifti(_marked(np.nan).values)),
        "1 voxels were NaN or infinite",
        _marked(np.nan),
        must="replaced, counted, warn",
    ),
    refused(47, "every voxel NaN", file("a.nii", nifti(GOOD.values * np.nan)), "every voxel is NaN"),
    warned(
        48,
        "one voxel infinite",
        file("a.nii", nifti(_marked(np.inf).values)),
        "1 voxels were NaN or infinite",
        _marked(np.inf),
        must="replaced, warn",
    ),
    Case(49, "float64 values up to 1e308", "no overflow", _check_huge, _huge, HUGE),
    warned(50, "scl_slope NaN", file("a.nii", nifti(scl_slope=np.nan)), "unscaled", GOOD, must="unset, warn"),
    warned(50, "scl_slope infinite", file("a.nii", nifti(scl_slope=np.inf)), "unscaled", GOOD, must="unset, warn"),
    same(
        51,
        "scl_slope -0.5",
        file("a.nii", nifti(GOOD.values.astype(np.int16), scl_slope=-0.5, scl_inter=10)),
        MILD,
        must="applied",
    ),
    _typed("uint16", "u2"),
    _typed("int8", "i1"),
    _typed("uint64", "u8"),
    same(
        52,
        "voxels of bool, as uint8",
        file("a.nii", nifti((GOOD.values > 60).astype("u1"))),
        Volume((GOOD.values > 60).astype(np.float32), AFFINE),
    ),
    refused(52, "voxels of one bit", file("a.nii", nifti(datatype=1, bitpix=1)), "one-bit"),
    refused(53, "complex voxels", file("a.nii", nifti(GOOD.values.astype(np.complex64))), "complex"),
    refused(54, "RGB voxels", file("a.nii", nifti(datatype=128, bitpix=24)), "RGB"),
    same(55, "4-D, one frame", file("a.nii", nifti(GOOD.values[..., None])), GOOD, must="read as 3-D"),
    refused(56, "4-D, three frames", file("a.nii", nifti(FRAMES)), "3 volumes where 1 is read"),
    Case(
        57,
        "intensities times 1000, real scan and model",
        "Dice within 0.5 points",
        _check_scale(lambda values: values * 1000),
    ),
    Case(
        57,
        "intensities plus 1e4, real scan and model",
        "Dice within 0.5 points",
        _check_scale(lambda values: values + 1e4),
    ),
    Case(58, "two channels, swapped", "refuse by channel names", _check_channels),
]
