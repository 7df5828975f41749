"""Files on a scan's grid: whole or not there, the same bytes for the same content, no trace of a patient's name."""

import gzip
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from jaxtyping import Float, Integer, Shaped
from numpy.typing import DTypeLike

from medseg_diff.files import replacing
from medseg_diff.palette import LABEL_COLORS
from medseg_diff.scans.geometry import header_for
from medseg_diff.scans.itk import LPS_TO_RAS
from medseg_diff.scans.read import Scan

GEOMETRY = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z", "xyzt_units"),
)

NIFTI = ".nii.gz"
TISSUE = "85756007", "Tissue"
VOCABULARY = "Segmentation category and type - 3D Slicer General Anatomy list"
ANATOMY = "Anatomic codes - DICOM master list"


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


def write_label_map(label_map: Integer[np.ndarray, "x y z"], scan: Scan, path: Path) -> None:
    """Writes a label map with the scan's geometry in the format that `path` ends on; see `mask_suffix`."""
    if mask_suffix(scan) == NIFTI:
        write_nifti([label_map], scan, path, label_map.dtype)
        return
    if path.suffix in (".png", ".tif"):
        image = sitk.GetImageFromArray(label_map[:, :, 0].T.astype(np.uint8 if label_map.max() < 256 else np.uint16))
    else:
        lps, spacing = LPS_TO_RAS @ scan.affine, np.array(scan.spacing_mm)
        image = sitk.GetImageFromArray(label_map.transpose(2, 1, 0))
        image.SetSpacing(spacing.tolist())
        image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
        image.SetOrigin(lps[:3, 3].tolist())
    with replacing(path) as temporary:
        sitk.WriteImage(image, temporary, useCompression=True)


def mask_suffix(scan: Scan) -> str:
    """How a mask in the scan's own format family ends; NIfTI for DICOM, whose own form not every mask can have."""
    return {"nrrd": ".nrrd", "mha": ".mha", "png": ".png", "tiff": ".tif"}.get(scan.kind, NIFTI)


def write_volume(array: Shaped[np.ndarray, "channels x y z"], affine: Float[np.ndarray, "4 4"], path: Path) -> None:
    """Writes a NIfTI file of the array's type on a grid of its own: 3-D for one channel, else 4-D."""
    header = header_for(affine, array.shape[1:])
    scan = Scan(path, path.name, array.astype(np.float32), affine, header, "nifti", ())
    write_nifti(array, scan, path, array.dtype, count=None if len(array) == 1 else len(array))


def label_dtype(values: Iterable[int]) -> type[np.integer]:
    """The type that masks of these labels are written in."""
    return np.uint8 if min(values := list(values)) >= 0 and max(values) <= 255 else np.int16


def write_seg_nrrd(
    label_map: Integer[np.ndarray, "x y z"],
    scan: Scan,
    names: dict[int, str],
    path: Path,
    codes: Mapping[int, tuple[str, str]] | None = None,
) -> None:
    """Writes a segmentation that 3D Slicer opens with its names and colours: one layer, label values kept.

    `codes` as of `codes_of`. Fields: https://slicer.readthedocs.io/en/latest/developer_guide/modules/segmentations.html
    """
    lps = LPS_TO_RAS @ scan.affine
    whole = " ".join(f"0 {n - 1}" for n in scan.shape)
    fields = {
        "type": "uint8" if label_map.max() < 256 else "int16",
        "dimension": "3",
        "space": "left-posterior-superior",
        "sizes": " ".join(map(str, scan.shape)),
        "space directions": " ".join(map(_vector, lps[:3, :3].T)),
        "kinds": "domain domain domain",
        "endian": "little",
        "encoding": "gzip",
        "space origin": _vector(lps[:3, 3]),
    }
    segments: dict[str, object] = {
        "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
        "Segmentation_SourceRepresentation": "Binary labelmap",
        "Segmentation_MasterRepresentation": "Binary labelmap",  # the same, for Slicer before 5.4
        "Segmentation_ReferenceImageExtentOffset": "0 0 0",
    }
    for i, (value, color) in enumerate(label_colors(names).items()):
        red, green, blue = (int(color[k : k + 2], 16) / 255 for k in (1, 3, 5))
        category, kind = (f"SCT^{code}^{meaning}" for code, meaning in codes_of(value, codes))
        segments |= {
            f"Segment{i}_ID": f"Segment_{value}",
            f"Segment{i}_Name": " ".join(names[value].split()),
            f"Segment{i}_NameAutoGenerated": 0,
            f"Segment{i}_Color": f"{red:.4f} {green:.4f} {blue:.4f}",
            f"Segment{i}_ColorAutoGenerated": 0,
            f"Segment{i}_LabelValue": value,
            f"Segment{i}_Layer": 0,
            f"Segment{i}_Extent": whole,
            f"Segment{i}_Tags": f"TerminologyEntry:{VOCABULARY}~{category}~{kind}~^^~{ANATOMY}~^^~^^|",
        }
    lines = [f"{k}: {v}" for k, v in fields.items()] + [f"{k}:={v}" for k, v in segments.items()]
    slabs = _slabs(label_map, scan.shape, np.dtype(str(fields["type"])))
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(("NRRD0004\n" + "\n".join(lines) + "\n\n").encode())
        with gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as stream:
            stream.writelines(slabs)


def codes_of(value: int, codes: Mapping[int, tuple[str, str]] | None) -> tuple[tuple[str, str], tuple[str, str]]:
    """SNOMED CT code and meaning of a label's category and type, from two times "ID |term|"; else of tissue."""
    if not codes or value not in codes:
        return TISSUE, TISSUE
    (category, _, named), (kind, _, called) = (text.rstrip("|").partition(" |") for text in codes[value])
    return (category, named), (kind, called)


def label_colors(names: dict[int, str]) -> dict[int, str]:
    """Label value -> colour, the same in every picture and file; without the background, ascending."""
    return dict(zip(sorted(value for value in names if value), itertools.cycle(LABEL_COLORS), strict=False))


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


def _vector(numbers: np.ndarray) -> str:
    return "(" + ",".join(repr(float(n)) for n in numbers) + ")"
