"""Cases on the network's grid, prepared once and kept as plain arrays that the operating system pages in.

MONAI's PersistentDataset is not used: it pickles, and it serves stale volumes after a change of a file or a transform.
"""

import hashlib
import json
import resource
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import monai
import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

import medseg_diff
from medseg_diff.datasets.layouts import Case
from medseg_diff.datasets.pipeline import Preprocessing, label_keys, load, preparing
from medseg_diff.datasets.reading import check_values
from medseg_diff.diffusion.masks import IGNORED
from medseg_diff.errors import UserError
from medseg_diff.files import replacing

MOST_CLASSES = IGNORED
"""A voxel's label takes a byte, one value of which is not learned."""

SEEDS_PER_CLASS = 4096
"""Labelled voxels of a class that are remembered as centres for crops."""


def code_digest(package: Path) -> str:
    """SHA-256 of the program that prepares a volume: scans, transforms, this module, and the versions behind them."""
    sources = [package / "datasets/pipeline.py", package / "datasets/cache.py", *sorted(package.glob("scans/*.py"))]
    versions = f"{medseg_diff.__version__} {monai.__version__}"
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources) + versions.encode()).hexdigest()


CODE = code_digest(Path(medseg_diff.__file__).parent)
"""What prepared a volume; another program prepares it anew."""


@dataclass(frozen=True)
class Volume:
    """A case on the network's grid."""

    name: str
    image: Float32[Tensor, "channels x y z"]
    labels: UInt8[Tensor, "raters x y z"]
    centres: tuple[np.ndarray, ...]


def load_volumes(
    cases: Sequence[Case],
    how: Preprocessing,
    *,
    values: Sequence[int],
    channels: int,
    folder: Path,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Volume]:
    """Prepared cases, from the cache where files and transforms are as they were. Raises UserError.

    Labels become indices into `values`, which ascend.
    """
    if len(values) > MOST_CLASSES:
        what = f"{len(values)} labels are declared, and {MOST_CLASSES} can be learned with the background"
        raise UserError("labels", what, "Merge some of them.")
    _allow_open_files(2 * len(cases))
    volumes = []
    for done, case in enumerate(cases, start=1):
        stem = folder / _key(case, how, values, channels)
        paths = [stem.with_suffix(suffix) for suffix in (".image.npy", ".labels.npy")]
        if not all(path.exists() for path in paths):
            for path, array in zip(paths, _prepare(case, how, values, channels), strict=True):
                with replacing(path) as temporary:
                    np.save(temporary, array)
        image, labels = (np.load(path, mmap_mode="c") for path in paths)
        volumes.append(
            Volume(case.name, torch.from_numpy(image), torch.from_numpy(labels), _centres(labels, len(values)))
        )
        progress(done)
    return volumes


def _allow_open_files(more: int) -> None:
    """A mapped array keeps its file open, and many systems let a process open 256 or 1024 until it asks for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft + more, hard), hard))


def _prepare(case: Case, how: Preprocessing, values: Sequence[int], channels: int) -> tuple[np.ndarray, np.ndarray]:
    keys = label_keys(len(case.labels))
    loaded, allowed = load(case, channels), {*values, case.ignore}
    for key, path in zip(keys, case.labels, strict=True):
        check_values(np.unique(loaded[key].numpy()).tolist(), allowed, path)
    prepared = preparing(how, len(keys))(loaded)
    image = prepared["image"].as_tensor().numpy().astype(np.float32)
    if not keys:
        return image, np.zeros((0, *image.shape[1:]), np.uint8)
    maps = np.rint(np.concatenate([prepared[key].as_tensor().numpy() for key in keys])).astype(np.int64)
    return image, np.where(maps == case.ignore, IGNORED, np.searchsorted(values, maps)).astype(np.uint8)


def _centres(labels: np.ndarray, classes: int) -> tuple[np.ndarray, ...]:
    """For each class that is there, voxels [n, 3] spread over the structure."""
    found = []
    for index in range(1, classes):
        positions = np.argwhere((labels == index).any(0)) if len(labels) else np.empty((0, 3), int)
        if len(positions):
            found.append(positions[:: -(-len(positions) // SEEDS_PER_CLASS)])
    return tuple(found)


def _key(case: Case, how: Preprocessing, values: Sequence[int], channels: int) -> str:
    files = [
        (str(path.resolve()), (status := path.stat()).st_size, status.st_mtime_ns)
        for path in (*case.images, *case.labels)
    ]
    content = json.dumps([CODE, files, case.ignore, asdict(how), list(values), channels])
    return hashlib.sha256(content.encode()).hexdigest()[:32]
