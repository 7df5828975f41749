"""A data set -> cases, whatever its layout; everything wrong with its description at once."""

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from medseg_diff.datasets.description import SEE, channels_of, describe, first, labels_of, required, visible
from medseg_diff.errors import UserError
from medseg_diff.scans.read import read_label_map, scan_name

Part = Literal["train", "val"]


@dataclass(frozen=True)
class Case:
    """One patient: an image, and one label file a rater (none where it is not labelled).

    Attributes:
        further: of an image with a file a channel, those of the second channel and the following.
        ignore: the label value of voxels that are left out of every loss and measure.
        part: where the data set itself says what is trained on and what is held out.
        truth: the law that the raters' masks are drawn from, where it is known (see datasets/ambiguous.py).

    """

    name: str
    image: Path
    labels: tuple[Path, ...]
    truth: Path | None = None
    further: tuple[Path, ...] = ()
    ignore: int | None = None
    part: Part | None = None

    @property
    def images(self) -> tuple[Path, ...]:
        """Every file of the image."""
        return self.image, *self.further


@dataclass(frozen=True)
class Dataset:
    """A labelled set: `labels` maps value to name, ascending, 0 is background; `cases` are sorted by name."""

    root: Path
    name: str
    labels: dict[int, str]
    channels: tuple[str, ...]
    cases: tuple[Case, ...]
    modality: str


def read_dataset(path: Path) -> Dataset:
    """The data set of a folder or a table; every file must be there, under the folder, with its partner.

    Raises UserError, the first of `survey`.
    """
    dataset, errors = survey(path)
    if errors:
        more = f" medseg-diff check names {len(errors) - 1} more." if errors[1:] else ""
        raise UserError(errors[0].where, errors[0].what, errors[0].advice + more)
    return dataset


def survey(path: Path) -> tuple[Dataset, list[UserError]]:
    """What can be read of a data set, and everything wrong with its description; raises where there is none to read."""
    errors: list[UserError] = []
    where, description, complete = describe(path, errors)
    root = where.parent
    labels: dict[int, str] = {0: "background"}
    channels: tuple[str, ...] = ("unknown",)
    cases: list[Case] = []
    ignore = None
    with _noting(errors):
        channels = channels_of(where, description)
    with _noting(errors):
        if "labels" in description or complete:
            labels, ignore = labels_of(where, description)
    with _noting(errors):
        for entry in required(where, description, "training", list):
            with _noting(errors):
                cases.append(_case(root, where, entry, channels, description.get("truth"), ignore))
        cases = sorted((case for case in cases if not case.image.name.startswith(".")), key=lambda case: case.name)
        if not cases and not errors:
            raise UserError(where, "it has no training cases", f"List them under 'training'. {SEE}")
    twice = [name for name, count in Counter(case.name for case in cases).items() if count > 1]
    if twice:
        advice = "Give every image a name of its own (in a table, in a column 'case'), and list it once."
        errors.append(UserError(where, f"cases share a name: {first(twice)}", advice))
    missing = [path for case in cases for path in (*case.images, *case.labels) if not path.is_file()]
    if missing:
        what = f"{len(missing)} listed file(s) are missing: {first([str(path.relative_to(root)) for path in missing])}"
        errors.append(UserError(root, what, "Restore them, or remove their cases from the data set's description."))
    if complete:
        errors += _unlisted(cases)
    if "labels" not in description and not errors:
        with _noting(errors):
            labels = _found_labels(cases)
    name, modality = str(description.get("name", root.resolve().name)), description.get("modality")
    modality = modality if isinstance(modality, str) else channels[0]
    return Dataset(root, name, labels, channels, tuple(cases), modality), errors


def split(dataset: Dataset, folds: int, fold: int) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Training and validation cases: those that the data set says, or case i validates where `i % folds == fold`.

    Raises UserError.
    """
    cases = dataset.cases
    if any(case.part for case in cases):
        open_ = [case.name for case in cases if case.part is None]
        if open_:
            what = f"{len(open_)} cases are neither for train nor for val, the first is {open_[0]}"
            raise UserError(dataset.root, what, "Fill in their split, or leave it away for all.")
        training, validation = (tuple(case for case in cases if case.part == part) for part in get_args(Part))
        whose, advice = "the column split", "Give some cases train and some val."
    else:
        training = tuple(case for i, case in enumerate(cases) if i % folds != fold)
        validation = tuple(case for i, case in enumerate(cases) if i % folds == fold)
        whose = f"fold {fold} of {folds}"
        advice = "Choose data.folds from 2 to the number of cases, and data.fold below it."
    if not training or not validation:
        what = f"{whose} leaves {len(training)} cases to train on and {len(validation)} to validate on"
        raise UserError(dataset.root, what, advice)
    return training, validation


def digest(dataset: Dataset) -> str:
    """SHA-256 over case names, bytes of the files, and labels; where the folder lies does not matter."""
    cases = [(case.name, *map(file_digest, case.images), [*map(file_digest, case.labels)]) for case in dataset.cases]
    return hashlib.sha256(json.dumps([list(dataset.labels.items()), cases]).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, which are read once while it does not change."""
    status = path.stat()
    return _file_digest(path.resolve(), status.st_size, status.st_mtime_ns)


@cache
def _file_digest(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def twins(root: Path, digests: Mapping[str, str]) -> list[UserError]:
    """The same scan under several names of cases, whose digests are given."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, found in digests.items():
        names[found].append(name)
    advice = "Keep one: a copy in training and validation would make the scores too good."
    return [
        UserError(root, f"the same scan under several names: {', '.join(same)}", advice)
        for same in names.values()
        if len(same) > 1
    ]


def _unlisted(cases: Iterable[Case]) -> list[UserError]:
    """Images without a label and labels without an image, beside the listed files; a pair was left out on purpose."""
    images = {path for case in cases for path in case.images}
    labels = {path for case in cases for path in case.labels}
    more_images, more_labels = (
        {path for folder in {path.parent for path in listed} for path in visible(folder)} - images - labels
        for listed in (images, labels)
    )
    errors = []
    for found, others, noun, other in (
        (more_images, more_labels, "an image", "label"),
        (more_labels, more_images, "a label", "image"),
    ):
        partners = {_without_channel(path) for path in others}
        advice = f"List it in dataset.json with its {other}, or move it away."
        errors += [
            UserError(path, f"it is {noun} without {other} that no case lists", advice)
            for path in sorted(found)
            if _without_channel(path) not in partners
        ]
    return errors


def _without_channel(path: Path) -> str:
    return re.sub(r"_\d{4}$", "", scan_name(path))


def _found_labels(cases: Iterable[Case]) -> dict[int, str]:
    """Values of the label files, which serve as names, where nothing declares them."""
    values = {int(value) for case in cases for path in case.labels for value in np.unique(read_label_map(path)[0])}
    return {0: "background"} | {value: f"label {value}" for value in sorted(values - {0})}


def _case(root: Path, where: Path, entry: Any, channels: tuple[str, ...], truth: Any, ignore: int | None) -> Case:
    given = entry.get("image") if isinstance(entry, dict) else None
    if isinstance(given, dict):
        if sorted(given) != sorted(channels):
            what = f"the channels of a case are {', '.join(given)}, and {', '.join(channels)} are declared"
            raise UserError(where, what, "Give every case the same channels, by the same names.")
        given = [given[channel] for channel in channels]
    images, labels = _paths(given), _paths(entry.get("label") or [] if isinstance(entry, dict) else [])
    if not images:
        raise UserError(where, f"a training case names no image: {entry}", SEE)
    if labels is None:
        raise UserError(where, f"the 'label' of {images[0]} is no path and no list of paths: {entry['label']}", SEE)
    image, *further = _channel_files([_inside(root, where, path) for path in images], len(channels))
    name, part = str(entry.get("name", scan_name(_inside(root, where, images[0])))), entry.get("split")
    if part not in (None, *get_args(Part)):
        raise UserError(where, f"the split of {name} is {part}", "Write train or val.")
    law = _inside(root, where, f"{truth}/{name}.json") if isinstance(truth, str) else None
    files = tuple(_inside(root, where, label) for label in labels)
    return Case(name, image, files, law, tuple(further), ignore, part)


def _paths(given: Any) -> list[str] | None:
    """One path or several as a list; None of anything else."""
    paths = [given] if isinstance(given, str) else given
    return paths if isinstance(paths, list) and all(isinstance(path, str) for path in paths) else None


def _channel_files(images: list[Path], channels: int) -> list[Path]:
    """nnU-Net v1 lists knee.nii.gz, and knee_0000.nii.gz, knee_0001.nii.gz, ... are there."""
    name = scan_name(images[0])
    files = [images[0].with_name(f"{name}_{i:04}{images[0].name[len(name) :]}") for i in range(channels)]
    return images if images[0].is_file() or not files[0].is_file() else files


def _inside(root: Path, where: Path, path: str) -> Path:
    """The path under the root, without ./ and ../; links are followed, as many data sets are made of them."""
    relative = os.path.relpath(root / path, root)
    if Path(relative).parts[:1] == (os.pardir,):
        raise UserError(where, f"{path} leads outside the data set", "Move the file into its folder.")
    return root / relative


@contextmanager
def _noting(errors: list[UserError]) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        errors.append(error)
