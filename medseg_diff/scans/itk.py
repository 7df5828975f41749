"""NRRD, MHA, PNG and TIFF through SimpleITK, after the checks that it leaves out."""

import os
import re
from pathlib import Path
from typing import BinaryIO

import numpy as np
import SimpleITK as sitk

from medseg_diff.errors import UserError
from medseg_diff.scans.geometry import check_geometry
from medseg_diff.scans.payload import COPY_AGAIN, Payload

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
HEADER_LIMIT, FIELD_LIMIT = 1 << 20, 256
PICTURES = (".png", ".tif", ".tiff")
META_IMAGES = (".mha", ".mhd")


def read_itk(path: Path, channels: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Values "channels x y z" in the file's own type, affine in mm, warnings."""
    if path.suffix.lower() == ".nrrd":
        _check_lines(path)
    if path.suffix.lower() in META_IMAGES:
        _check_dimensions(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        reader.ReadImageInformation()
        sizes, components = reader.GetSize(), reader.GetNumberOfComponents()
        x, y, z = (*sizes[:3], 1)[:3]
        picture = path.suffix.lower() in PICTURES
        if "complex" in sitk.GetPixelIDValueAsString(reader.GetPixelIDValue()):
            raise UserError(path, "its voxels are complex", "Convert it to integer or float32 gray values.")
        frames = components * int(np.prod(sizes[3:], dtype=object))
        if frames != channels:
            advice = "Give one gray value a voxel." if channels == 1 else "Give every channel, in the model's order."
            raise UserError(path, f"it holds {frames} values a voxel where {channels} are read", advice)
        if picture and (z > 1 or components > 3):  # 4 are also what ITK makes of TIFF files beyond its own reading
            advice = "Save it as a plain picture, or a stack as NIfTI, NRRD or MHA."
            raise UserError(path, "it holds several pages, transparency or an unusual kind of pixels", advice)
        affine = LPS_TO_RAS.copy() if picture else affine_of(reader)
        warnings = check_geometry(path, affine, (x, y, z, frames))
        if picture:
            warnings.append("a picture has no voxel size: 1 mm is assumed")
        else:
            _check_container(path, x * y * z * frames * _bytes_a_value(reader.GetPixelIDValue()))
        values = voxels(reader.Execute())
    except RuntimeError as error:
        raise UserError(path, "it is damaged, or not of the kind its name says", COPY_AGAIN) from error
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(True)
    return values, affine, warnings


def voxels(image: sitk.Image) -> np.ndarray:
    """Values "channels x y z": the components, or the frames, of an image."""
    x, y, z = (*image.GetSize()[:3], 1)[:3]
    values = sitk.GetArrayFromImage(image)  # t z y x, components last
    if image.GetNumberOfComponentsPerPixel() > 1:
        values = np.moveaxis(values, -1, 0)
    return values.reshape(-1, z, y, x).transpose(0, 3, 2, 1)


def affine_of(reader: sitk.ImageFileReader | sitk.Image) -> np.ndarray:
    """RAS affine of the first three axes."""
    n, used = reader.GetDimension(), min(reader.GetDimension(), 3)
    direction = np.array(reader.GetDirection()).reshape(n, n)[:used, :used]
    affine = np.eye(4)
    affine[:used, :used] = direction * np.array(reader.GetSpacing())[:used]
    affine[:used, 3] = np.array(reader.GetOrigin())[:used]
    return LPS_TO_RAS @ affine


def _bytes_a_value(pixel_id: int) -> int:
    return sitk.Image([1, 1], pixel_id).GetSizeOfPixelComponent()


def _check_container(path: Path, size: int) -> None:
    """Voxels must lie in the file or in one beside it, undamaged, and fill `size` bytes.

    SimpleITK reads an MHA with a flipped byte in its compressed part without a word, and follows any path in a header.
    """
    with path.open("rb") as file:
        fields = _text_header(file, "=" if path.suffix.lower() != ".nrrd" else ":")
        name = next((fields[key] for key in ("elementdatafile", "data file", "datafile") if key in fields), "LOCAL")
        local, beside = name.upper() == "LOCAL", path.parent / name
        if not local and (Path(name).name != name or beside.is_symlink() or not beside.is_file()):
            raise UserError(path, "its voxels are in a file that is not beside it", "Save the scan as one file.")
        with file if local else beside.open("rb") as data:
            if fields.get("compresseddata", "").lower() == "true" or fields.get("encoding", "") in ("gz", "gzip"):
                complete = Payload(path, data, compressed=True).rest(size) == size
            else:
                left = os.fstat(data.fileno()).st_size - data.tell()
                as_text = fields.get("binarydata", "").lower() == "false" or fields.get("encoding", "raw") != "raw"
                complete = left >= size or as_text
    if not complete:
        raise UserError(path, f"its voxels do not fill the {size} bytes that its header promises", COPY_AGAIN)


def _check_lines(path: Path) -> None:
    """Lines above the voxels are fields, comments or keys with values; others, and long ones, kill SimpleITK."""
    with path.open("rb") as file:
        while (line := file.readline(HEADER_LIMIT).strip()) and file.tell() <= HEADER_LIMIT:
            found = re.match(rb"NRRD|#|[^:]+:=|[^:]+:", line)
            if not found or (found[0][-1:] == b":" and len(line) > FIELD_LIMIT):
                raise UserError(path, "its header is damaged: a line is no field, or too long for one", COPY_AGAIN)


def _check_dimensions(path: Path) -> None:
    """Many of them, as in NDims = 333, kill SimpleITK."""
    with path.open("rb") as file:
        count = _text_header(file, "=").get("ndims", "")
    if count and count not in ("2", "3", "4"):
        raise UserError(path, f"its header is damaged: it promises {count[:20]} dimensions", COPY_AGAIN)


def _text_header(file: BinaryIO, separator: str) -> dict[str, str]:
    """The fields above the voxels of an MHA or NRRD file, which is left where the voxels begin."""
    fields: dict[str, str] = {}
    while line := file.readline(HEADER_LIMIT).decode("latin-1").strip():
        key, _, value = line.partition(separator)
        fields[key.strip().lower()] = value.strip()
        if "elementdatafile" in fields or file.tell() > HEADER_LIMIT:
            break
    return fields
