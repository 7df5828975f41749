"""Valid small files of every kind that is read, and what damages them."""

import gzip
import io
import random
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless, generate_uid

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = [n.to_bytes(size, order, signed=n < 0) for size in (1, 2, 4, 8) for order in ("little", "big")
           for n in (0, 1, -1, 2 ** (8 * size - 1) - 1, -(2 ** (8 * size - 1)))]  # fmt: skip
FLOATS = [np.float32(f).tobytes() for f in (np.nan, np.inf, -np.inf, 1e38, 1e-45, -1.0)]
WORDS = [
    b"!!python/object/apply:os.system ['touch escaped']",
    b"&a [*a, *a]",
    b"../",
    b"/tmp/x",
    b"1e999",
    b"-1",
    b"{",
    b"[",
]
WORDS += [b"\0", b"\xff\xfe", b"\n", b":", b"9" * 400, b"[" * 3000, b"null", b"2001-99-99", b"%s%n", b"LOCAL", b"gzip"]


def make_corpus(folder: Path, model: Path) -> None:
    """One file a kind of input."""
    values = np.arange(6 * 5 * 4, dtype=np.int16).reshape(6, 5, 4)
    affine = np.array([[-1.2, 0.1, 0, 3], [0.1, 1.1, 0, -4], [0, 0, 2, 5], [0, 0, 0, 1.0]])
    first, second = nib.Nifti1Image(values, affine), nib.Nifti2Image(values.astype(np.float32), affine)
    first.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"a comment of some length"))
    swapped = nib.Nifti1Image(values.astype(">i2"), affine, nib.Nifti1Header(endianness=">"))
    scaled = nib.Nifti1Image(values, affine)
    scaled.header.set_slope_inter(0.5, -3)
    for name, image in (("first.nii", first), ("scaled.nii", scaled), ("swapped.nii", swapped), ("second.nii", second)):
        image.to_filename(folder / name)
    (folder / "packed.nii.gz").write_bytes(gzip.compress((folder / "first.nii").read_bytes()))
    image = sitk.GetImageFromArray(values.transpose(2, 1, 0))
    for name, compressed in (("a.nrrd", False), ("b.nrrd", True), ("a.mha", False), ("b.mha", True)):
        sitk.WriteImage(image, folder / name, useCompression=compressed)
    for name in ("a.png", "a.tif"):
        sitk.WriteImage(sitk.GetImageFromArray(values[..., 0].astype(np.uint8)), folder / name)
    for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless):
        (folder / f"{syntax.name.split()[0].lower()}.dcm").write_bytes(_slice(values[..., 0], 0.0, syntax))
    with zipfile.ZipFile(folder / "series.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for z in range(3):
            archive.writestr(f"s/{z}.dcm", _slice(values[..., z], 2.0 * z, ExplicitVRLittleEndian))
    with zipfile.ZipFile(folder / "scans.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / "first.nii", "p1/first.nii")
        archive.write(folder / "packed.nii.gz", "p2/packed.nii.gz")
    (folder / "model.safetensors").write_bytes(model.read_bytes())
    for path in (ROOT / "configs").glob("*.yaml"):
        (folder / path.name).write_bytes(path.read_bytes())


def damaged(corpus: dict[str, bytes], seed: int, index: int) -> tuple[str, bytes]:
    """The name of a file, and what has become of its bytes; the same for the same numbers."""
    chance = random.Random(f"{seed} {index}")
    name = chance.choice(sorted(corpus))
    content = corpus[name]
    if name.endswith(".gz") and chance.random() < 0.7:
        return name, gzip.compress(_mutated(gzip.decompress(content), corpus, chance), 1)
    if name.endswith(".zip") and chance.random() < 0.7:
        return name, _rezipped(content, corpus, chance)
    return name, _mutated(content, corpus, chance)


def _mutated(content: bytes, corpus: dict[str, bytes], chance: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        near = chance.random() < 0.7  # the head decides more than the rest
        at = chance.randrange(min(len(data), 600) if near else len(data)) if data else 0
        length = chance.choice((1, 2, 4, 8, 64, 1000))
        match chance.randrange(8):
            case 0:
                data[at : at + 1] = bytes([data[at] ^ 1 << chance.randrange(8)]) if data else b""
            case 1:
                new = chance.choice(NUMBERS + FLOATS)
                data[at : at + len(new)] = new
            case 2:
                data[at : at + length] = chance.randbytes(length)
            case 3:
                del data[at : at + length]
            case 4:
                data[at:at] = chance.choice(WORDS)
            case 5:
                data[at:at] = data[at : at + length] * chance.choice((1, 2, 50))
            case 6:
                del data[chance.randrange(len(data) + 1) :]
            case 7:
                other = corpus[chance.choice(sorted(corpus))]
                start = chance.randrange(len(other))
                data[at : at + length] = other[start : start + length]
    return bytes(data)


def _rezipped(content: bytes, corpus: dict[str, bytes], chance: random.Random) -> bytes:
    """Members that are damaged, renamed, doubled or made a link."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as given, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for member in given.namelist():
            data, info = given.read(member), zipfile.ZipInfo(member)
            match chance.randrange(5):
                case 0:
                    data = _mutated(data, corpus, chance)
                case 1:
                    info.filename = chance.choice(("../", "/", "a/../../", "C:\\", "", "\0", "s/")) + info.filename
                case 2:
                    info.external_attr = chance.choice((0o120777, 0o010777, 0o040777, 0)) << 16
            archive.writestr(info, data)
    return stream.getvalue()


def _slice(pixels: np.ndarray, z: float, syntax: pydicom.uid.UID) -> bytes:
    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = (
        ImplicitVRLittleEndian if syntax == ImplicitVRLittleEndian else ExplicitVRLittleEndian
    )
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, generate_uid(entropy_srcs=[str(z)])
    dataset.SeriesInstanceUID, dataset.PatientName = "1.2.3", "Doe^Jane"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation, dataset.SamplesPerPixel = 15, 1, 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.PixelSpacing, dataset.SliceThickness = [1.0, 1.0], 2
    dataset.ImageOrientationPatient, dataset.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, z]
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, -5
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OW"
    if syntax == RLELossless:
        dataset.compress(RLELossless)
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()
