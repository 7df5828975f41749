"""NIfTI files of any content, byte by byte."""

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np

from bad_inputs.case import Maker, Volume

AFFINE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.3, -0.2, 0.5) @ np.diag([0.7, 1.1, 2.5]), [-31.0, 12.5, 7.0]
)
MEMBER_BYTES = 1 << 26
X, Y, Z = np.mgrid[:12, :10, :8]
GOOD = Volume(np.rint(60 + 30 * np.sin(X / 2) + 25 * np.cos(Y / 3 + Z)).astype(np.float32), AFFINE)
"""Whole numbers from 5 to 115, which every number type holds, on an oblique grid."""


def nifti(values=GOOD.values, affine=AFFINE, version=1, order="<", tail=b"", extension=b"", **fields) -> bytes:
    """The bytes of a NIfTI file with any header field set to anything; a mapping sets some places of a field."""
    header = (nib.Nifti1Header if version == 1 else nib.Nifti2Header)(endianness=order)
    header.set_data_dtype(values.dtype.newbyteorder(order))
    header.set_data_shape(values.shape)
    header.set_sform(affine, 1)
    header.set_qform(affine, 1)
    header.set_xyzt_units("mm")
    header["vox_offset"] = header["sizeof_hdr"] + 4 + len(extension)
    header["scl_slope"], header["scl_inter"] = 1, 0
    for name, value in fields.items():
        if isinstance(value, dict):
            for index, number in value.items():
                header[name][index] = number
        else:
            header[name] = value
    voxels = values.astype(values.dtype.newbyteorder(order)).tobytes(order="F")
    extender = extension[:4] + extension[4:] + bytes(4) if extension else bytes(4)
    return header.binaryblock + extender + voxels + tail


def file(name: str, content: bytes) -> Maker:
    """Writes that content under that name."""

    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def zeros(path: Path, shape: tuple[int, int, int]) -> Path:
    """That many bytes of zeros, all there: gzip members of 64 MiB each, which the shape must fill."""
    header = nifti(np.zeros((1, 1, 1), np.uint8), dim=dict(enumerate(shape, start=1)))[:-1]
    members, left = divmod(int(np.prod(shape)), MEMBER_BYTES)
    assert left == 0
    path.write_bytes(gzip.compress(header) + gzip.compress(bytes(MEMBER_BYTES), mtime=0) * members)
    return path
