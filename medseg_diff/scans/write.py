"""Files on a scan's grid: whole or not there, the same bytes for the same content, no trace of a patient's name."""

import gzip
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from medseg_diff.errors import UserError
from medseg_diff.scans.read import Scan

GEOMETRY = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z", "xyzt_units"),
)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; then it takes the place of `path`, or, after an error, is removed.

    The old file stays whole until the new one is on the disk. UserError where the disk refuses.
    """
    suffix = ".nii.gz" if path.name.endswith(".nii.gz") else path.suffix
    temporary = path.with_name(f".{secrets.token_hex(8)}{suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        what = f"it cannot be written ({error.strerror or error})"
        raise UserError(path, what, "Free some space, or choose a folder that can be written to.") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_nifti(
    frames: Iterable[np.ndarray], scan: Scan, path: Path, dtype: DTypeLike, count: int | None = None
) -> None:
    """Writes frames of shape x y z, one at a time, with the scan's affine, form codes and unit.

    `count` None writes one frame as a 3-D file (2-D where the scan is), otherwise `count` frames as a 4-D file.
    A frame of another shape, or with values that `dtype` cannot hold, is a ValueError.
    """
    dtype = np.dtype(dtype)
    shape = scan.header.get_data_shape()[:3] if count is None else (*scan.shape, count)
    header = _header(scan, shape, dtype)
    written = 0
    with replacing(path) as temporary, temporary.open("wb") as file:
        # The name and the time that gzip records would make equal contents differ.
        compressed = path.name.endswith(".gz")
        stream = gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) if compressed else file
        with stream:
            stream.write(header)
            for frame in frames:
                for slab in _slabs(frame, scan.shape, dtype):
                    stream.write(slab)
                written += 1
            if written != (count or 1):
                raise ValueError(f"{written} frames came where {count or 1} were promised")


def _header(scan: Scan, shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """The geometry of the scan's header, and nothing else of it."""
    header = type(scan.header)()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    for field in GEOMETRY:
        header[field] = scan.header[field]
    header["pixdim"][:4] = scan.header["pixdim"][:4]
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["vox_offset"] = int(header["sizeof_hdr"]) + 4
    return header.binaryblock + bytes(4)


def _slabs(frame: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[bytes]:
    if frame.shape != shape:
        raise ValueError(f"a frame of shape {frame.shape} on a grid of {shape}")
    if dtype.kind in "iu" and not np.iinfo(dtype).min <= frame.min() <= frame.max() <= np.iinfo(dtype).max:
        raise ValueError(f"values from {frame.min()} to {frame.max()} do not fit {dtype}")
    for z in range(shape[2]):
        yield frame[:, :, z].astype(dtype.newbyteorder("<")).tobytes(order="F")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
