"""NIfTI-1 and NIfTI-2, in one file or two, checked field by field before any memory is claimed.

nibabel and SimpleITK each read some damaged files as if they were whole, so the container is read here and nibabel
only interprets the header. Fields: https://nifti.nimh.nih.gov/pub/dist/src/niftilib/nifti1.h
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np

from medseg_diff.errors import UserError
from medseg_diff.scans.geometry import check_geometry, largest_shift, spacing_of
from medseg_diff.scans.payload import COPY_AGAIN, GZIP, Payload

EXTENSION_LIMIT = 1 << 26
EXCESS_LIMIT = 1 << 24
MM_PER_UNIT = {1: 1000.0, 2: 1.0, 3: 0.001}  # metre, millimetre, micrometre: the low three bits of xyzt_units
DATATYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
UNREADABLE = {1: "one-bit", 32: "complex", 128: "RGB", 1536: "float128", 1792: "complex", 2048: "complex", 2304: "RGBA"}
PAIRED = (b"ni1\0", b"ni2\0")
CONVERT = "Convert the scan again, to a single NIfTI file, with a tool such as dcm2niix."

Header = nib.Nifti1Header | nib.Nifti2Header


def read_nifti(path: Path, channels: int) -> tuple[np.ndarray, np.ndarray, Header, list[str]]:
    """Values "channels x y z" (the file's type, or float64 where scaled), affine in mm, native header, warnings."""
    warnings: list[str] = []
    with path.open("rb") as file:
        payload = Payload(path, file)
        if payload.compressed != path.name.lower().endswith(".gz"):
            warnings.append(f"the file is {'' if payload.compressed else 'not '}compressed, whatever its name says")
        header = _header(path, payload)
        shape = _shape(path, header, channels)
        dtype = _dtype(path, header)
        affine = _affine(path, header, shape[:3], warnings)
        warnings += check_geometry(path, affine, shape)
        with _voxels(path, header, payload) as (beside, voxels):
            size = int(np.prod(shape)) * dtype.itemsize
            data = voxels.read(size)
            if len(data) < size:
                what = f"it ends after {len(data)} of the {size} bytes its header promises"
                raise UserError(beside, what, COPY_AGAIN)
            excess = voxels.rest(EXCESS_LIMIT)
    if excess > EXCESS_LIMIT:
        raise UserError(path, "it holds far more data than its header says", CONVERT)
    if excess:
        warnings.append(f"{excess} bytes after the voxels were ignored")
    if voxels.junk:
        warnings.append("junk after the compressed data was ignored")
    values = np.frombuffer(data, dtype).reshape(shape, order="F")
    native = header.as_byteswapped("<" if sys.byteorder == "little" else ">")
    return np.moveaxis(_scaled(header, values, warnings), 3, 0), affine, native, warnings


def _header(path: Path, payload: Payload) -> Header:
    block = payload.read(348)
    if not block:
        raise UserError(path, "it is empty", COPY_AGAIN)
    if block.startswith(GZIP):
        raise UserError(path, "it is compressed twice", "Run gunzip on it once.")
    order = {348: "<", 540: "<"}.get(int.from_bytes(block[:4], "little"), ">")
    size = int.from_bytes(block[:4], "little" if order == "<" else "big")
    if size == 540:
        block += payload.read(192)
    magic = {348: block[344:348], 540: block[4:8]}.get(size, b"")
    pair = path.suffix.lower() == ".hdr"
    if len(block) < size or magic not in (PAIRED if pair else (b"n+1\0", b"n+2\0")):
        if magic in PAIRED:
            raise UserError(
                path, "it is the header of a two-file pair (.hdr and .img)", "Name it .hdr, beside its .img."
            )
        raise UserError(path, "it is not a NIfTI file: its header size or magic is wrong", CONVERT)
    kind = nib.Nifti1Header if size == 348 else nib.Nifti2Header
    return kind(bytes(block), endianness=order, check=False)


def _shape(path: Path, header: Header, channels: int) -> tuple[int, int, int, int]:
    dim = [int(n) for n in header["dim"]]
    if not 1 <= dim[0] <= 7 or min(dim[1 : dim[0] + 1]) < 1:
        raise UserError(path, f"its dimensions are impossible: dim = {dim}", CONVERT)
    sizes = dim[1 : dim[0] + 1] + [1] * 7
    frames = int(np.prod(sizes[3:7], dtype=object))
    if frames != channels:
        advice = (
            "Give each volume as a file of its own." if channels == 1 else "Give every channel, in the model's order."
        )
        raise UserError(
            path, f"it holds {frames} volumes where {channels} {'is' if channels == 1 else 'are'} read", advice
        )
    return sizes[0], sizes[1], sizes[2], frames


def _dtype(path: Path, header: Header) -> np.dtype:
    code, bits = int(header["datatype"]), int(header["bitpix"])
    if code not in DATATYPES:
        what = UNREADABLE.get(code, "unknown")
        raise UserError(
            path, f"its voxels are {what} (datatype {code})", "Convert it to integer or float32 gray values."
        )
    dtype = np.dtype(DATATYPES[code]).newbyteorder(header.endianness)
    if bits != 8 * dtype.itemsize:
        raise UserError(path, f"its header contradicts itself: datatype {code} with {bits} bits a voxel", CONVERT)
    return dtype


def _affine(path: Path, header: Header, shape: tuple[int, ...], warnings: list[str]) -> np.ndarray:
    """The affine in mm. Makes the header's pixdim positive on the way, as the standard has it."""
    pixdim, used = header["pixdim"], min(int(header["dim"][0]), 3)
    if not (np.isfinite(pixdim[1 : used + 1]).all() and pixdim[1 : used + 1].all()):
        raise UserError(path, f"its voxel size is {pixdim[1:4].tolist()}", "Correct pixdim in its header.")
    if (pixdim[1 : used + 1] < 0).any():
        warnings.append("negative voxel sizes in pixdim were read as positive; the affine gives the orientation")
    pixdim[1 : used + 1] = abs(pixdim[1 : used + 1])
    pixdim[used + 1 : 4] = 1
    pixdim[0] = -1 if pixdim[0] < 0 else 1
    sform, qform = int(header["sform_code"]) > 0, int(header["qform_code"]) > 0
    try:
        affine = header.get_best_affine()
        if sform and qform:
            shift_mm = largest_shift(affine, header.get_qform(), shape)
            if not shift_mm < 0.1 * min(spacing_of(affine)):
                warnings.append(f"sform and qform disagree by up to {shift_mm:.3g}: the sform is used")
    except ValueError as error:
        raise UserError(path, "its quaternion (qform) is no rotation", "Correct the qform in its header.") from error
    if not sform and not qform:
        warnings.append(
            "sform_code and qform_code are 0: orientation and position are unknown, LAS around 0 is assumed"
        )
    unit = int(header["xyzt_units"]) & 7
    if MM_PER_UNIT.get(unit, 1.0) != 1:
        warnings.append(f"its unit is the {'metre' if unit == 1 else 'micrometre'}; it was converted to mm")
    return np.diag([*3 * [MM_PER_UNIT.get(unit, 1.0)], 1.0]) @ affine.astype(np.float64)


@contextmanager
def _voxels(path: Path, header: Header, payload: Payload) -> Iterator[tuple[Path, Payload]]:
    """The file that holds the voxels, and it from the first voxel on."""
    if header["magic"].item() + b"\0" not in PAIRED:
        _skip_extensions(path, header, payload)
        yield path, payload
        return
    beside, offset = path.with_suffix(".img"), float(header["vox_offset"])
    if not beside.is_file():
        raise UserError(path, f"its voxels are missing: there is no {beside.name} beside it", "Copy both files.")
    if not (0 <= offset <= EXTENSION_LIMIT and offset.is_integer()):
        raise UserError(path, f"its voxels would start at byte {offset:g}", CONVERT)
    with beside.open("rb") as file:
        voxels = Payload(beside, file)
        voxels.read(int(offset))
        yield beside, voxels


def _skip_extensions(path: Path, header: Header, payload: Payload) -> None:
    """Header extensions are passed over, and never copied: they may name a patient."""
    offset, start = float(header["vox_offset"]), int(header["sizeof_hdr"])
    if not (start + 4 <= offset <= EXTENSION_LIMIT and offset.is_integer()):
        raise UserError(path, f"its voxels would start at byte {offset:g}", CONVERT)
    block = payload.read(int(offset) - start)
    order: Literal["little", "big"] = "little" if header.endianness == "<" else "big"
    position = 4
    while block[:1] > b"\0" and position + 8 <= len(block):
        size = int.from_bytes(block[position : position + 4], order)
        if not 8 <= size <= len(block) - position:
            raise UserError(path, f"it has a header extension of {size} bytes in {len(block) - position}", CONVERT)
        position += size


def _scaled(header: Header, values: np.ndarray, warnings: list[str]) -> np.ndarray:
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if not np.isfinite([slope, inter]).all():
        warnings.append(f"scl_slope {slope:g} and scl_inter {inter:g} are not finite: the values are read unscaled")
        return values
    return values if slope == 0 or (slope, inter) == (1, 0) else values * np.float64(slope) + inter
