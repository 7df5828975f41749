"""1-30: files that are damaged, or lie about what they hold."""

import gzip
import struct
from pathlib import Path

import numpy as np

from bad_inputs.case import refused, same, warned
from bad_inputs.nifti import GOOD, file, nifti, zeros

PLAIN = nifti()
PACKED = gzip.compress(PLAIN, mtime=0)
MIDDLE = len(PACKED) // 2


def _bomb(folder: Path) -> Path:
    return zeros(folder / "bomb.nii.gz", (2048, 1024, 1024))


CASES = [
    refused(1, "an empty file", file("a.nii.gz", b""), "it is empty"),
    refused(2, "text, renamed", file("a.nii.gz", b"not a scan, " * 100), "not a NIfTI"),
    refused(3, "gzip cut in the middle", file("a.nii.gz", PACKED[:MIDDLE]), "end too early"),
    refused(4, "gzip cut in its last 8 bytes", file("a.nii.gz", PACKED[:-5]), "end too early"),
    refused(
        5,
        "one flipped byte",
        file("a.nii.gz", PACKED[:MIDDLE] + bytes([PACKED[MIDDLE] ^ 16]) + PACKED[MIDDLE + 1 :]),
        "damaged",
    ),
    refused(6, "a wrong CRC", file("a.nii.gz", PACKED[:-8] + bytes(4) + PACKED[-4:]), "damaged"),
    refused(7, "a wrong size after the CRC", file("a.nii.gz", PACKED[:-4] + struct.pack("<I", 99)), "damaged"),
    warned(8, "junk after the gzip member", file("a.nii.gz", PACKED + b"junk"), "junk after", GOOD),
    same(
        9,
        "two gzip members in a row",
        file("a.nii.gz", gzip.compress(PLAIN[:500]) + gzip.compress(PLAIN[500:])),
        GOOD,
    ),
    warned(10, "`.nii.gz` that is not gzip", file("a.nii.gz", PLAIN), "not compressed", GOOD),
    warned(11, "`.nii` that is gzip", file("a.nii", PACKED), "compressed, whatever its name", GOOD),
    refused(12, "fewer voxels than the header says", file("a.nii.gz", gzip.compress(PLAIN[:-100])), "it ends after"),
    warned(13, "more bytes than the header says", file("a.nii", PLAIN + bytes(7)), "7 bytes after the voxels", GOOD),
    refused(
        14,
        "some bytes that claim 32767^3 voxels",
        file("a.nii.gz", gzip.compress(nifti(dim={1: 32767, 2: 32767, 3: 32767})[:352])),
        r"more than the \d+ that are read|needs .* memory",
        must="refuse before memory is claimed",
    ),
    refused(
        15,
        "some bytes that claim 4 GiB",
        file("a.nii.gz", gzip.compress(nifti(dim={1: 1024, 2: 1024, 3: 1024})[:352])),
        r"ends after 0 of the 4294967296 bytes|needs .* memory",
        must="refuse before memory is claimed",
    ),
    refused(16, "2 GiB of zeros, all there, in 2 MB", _bomb, "more than the 1073741824 that are read"),
    refused(17, "gzip in gzip", file("a.nii.gz", gzip.compress(PACKED)), "compressed twice"),
    same(18, "a big-endian file", file("a.nii", nifti(order=">")), GOOD),
    refused(19, "a wrong magic", file("a.nii", nifti(magic=b"n+3")), "not a NIfTI"),
    refused(20, "sizeof_hdr 0", file("a.nii", nifti(sizeof_hdr=0)), "not a NIfTI"),
    refused(21, "vox_offset 1e9", file("a.nii", nifti(vox_offset=1e9)), r"start at byte 1e\+09"),
    refused(22, "vox_offset -16", file("a.nii", nifti(vox_offset=-16)), "start at byte -16"),
    refused(22, "vox_offset NaN", file("a.nii", nifti(vox_offset=np.nan)), "start at byte nan"),
    refused(23, "dim[0] = 0", file("a.nii", nifti(dim={0: 0})), "dimensions are impossible"),
    refused(23, "dim[0] = 9", file("a.nii", nifti(dim={0: 9})), "dimensions are impossible"),
    refused(24, "dim[1] = 0", file("a.nii", nifti(dim={1: 0})), "dimensions are impossible"),
    refused(25, "dim[2] = -5", file("a.nii", nifti(dim={2: -5})), "dimensions are impossible"),
    refused(26, "datatype 9999", file("a.nii", nifti(datatype=9999)), r"unknown \(datatype 9999\)"),
    refused(27, "8 bits a voxel of float32", file("a.nii", nifti(bitpix=8)), "8 bits a voxel"),
    refused(28, "`.hdr` without its `.img`", file("a.hdr", nifti(magic=b"ni1")), r"\.img|kind is not known"),
    refused(28, "a header of a pair, named `.nii`", file("a.nii", nifti(magic=b"ni1")), "pair"),
    same(29, "NIfTI-2", file("a.nii", nifti(version=2)), GOOD),
    same(29, "NIfTI-2, big-endian", file("a.nii", nifti(version=2, order=">")), GOOD),
    refused(
        30,
        "a header extension of 2^31 bytes",
        file("a.nii", nifti(extension=b"\1\0\0\0" + struct.pack("<iI", 2**31 - 16, 6))),
        "extension of 2147483632",
    ),
]
