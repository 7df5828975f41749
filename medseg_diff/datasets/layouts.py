"""A folder of labelled scans -> cases: the Decathlon layout, and nnU-Net's, which names its files but lists none."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medseg_diff.errors import UserError
from medseg_diff.scans.read import scan_name

SEE = "data/README.md shows the layout."
HIGHEST_LABEL = 2**15 - 1  # masks are written as int16


@dataclass(frozen=True)
class Case:
    """One patient: an image, and one label file a rater (none where it is not labelled).

    `truth` is the law that the raters' masks are drawn from, where it is known (see datasets/ambiguous.py).
    """

    name: str
    image: Path
    labels: tuple[Path, ...]
    truth: Path | None = None


@dataclass(frozen=True)
class Dataset:
    """A labelled set: `labels` maps value to name, ascending, 0 is background; `cases` are sorted by name."""

    root: Path
    name: str
    labels: dict[int, str]
    channels: tuple[str, ...]
    cases: tuple[Case, ...]
    modality: str


def read_dataset(root: Path) -> Dataset:
    """Read `root/dataset.json`; every path in it must lead to a file under `root`. Raises UserError."""
    dataset, errors = survey(root)
    if errors:
        raise errors[0]
    return dataset


def survey(root: Path) -> tuple[Dataset, list[UserError]]:
    """What can be read of a data set, and everything wrong with its description; raises where there is none to read."""
    where = root / "dataset.json"
    description = _description(root)
    errors: list[UserError] = []
    labels: dict[int, str] = {0: "background"}
    channels: tuple[str, ...] = ("unknown",)
    cases: list[Case] = []
    with _noting(errors):
        labels = _labels(where, description)
    with _noting(errors):
        channels = _channels(where, description)
    with _noting(errors):
        if "training" not in description and "file_ending" in description:
            cases = _nnunet_cases(root, str(description["file_ending"]), channels)
        else:
            for entry in _required(where, description, "training", list):
                with _noting(errors):
                    cases.append(_case(root, entry))
        cases = sorted((case for case in cases if not _hidden(case.image)), key=lambda case: case.name)
        if isinstance(description.get("truth"), str):
            folder = _inside(root, description["truth"])
            cases = [replace(case, truth=folder / f"{case.name}.json") for case in cases]
        if not cases and not errors:
            raise UserError(where, "it has no training cases", f"List them under 'training'. {SEE}")
    twice = [name for name, count in Counter(case.name for case in cases).items() if count > 1]
    if twice:
        errors.append(UserError(where, f"cases share a name: {_first(twice)}", "Give every image a name of its own."))
    missing = [path for case in cases for path in (case.image, *case.labels) if not path.is_file()]
    if missing:
        what = f"{len(missing)} listed file(s) are missing: {_first([str(path.relative_to(root)) for path in missing])}"
        errors.append(UserError(root, what, "Restore them, or remove their cases from dataset.json."))
    name, modality = str(description.get("name", root.resolve().name)), description.get("modality")
    modality = modality if isinstance(modality, str) else channels[0]
    return Dataset(root, name, labels, channels, tuple(cases), modality), errors


def split(dataset: Dataset, folds: int, fold: int) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Training and validation cases: the case with index i validates where `i % folds == fold`. Raises UserError."""
    training = tuple(case for i, case in enumerate(dataset.cases) if i % folds != fold)
    validation = tuple(case for i, case in enumerate(dataset.cases) if i % folds == fold)
    if not training or not validation:
        what = f"fold {fold} of {folds} leaves {len(training)} cases to train on and {len(validation)} to validate on"
        advice = "Choose data.folds from 2 to the number of cases, and data.fold below it."
        raise UserError(dataset.root, what, advice)
    return training, validation


def digest(dataset: Dataset) -> str:
    """SHA-256 over case names, bytes of the files, and labels; where the folder lies does not matter."""
    cases = [(case.name, file_digest(case.image), [*map(file_digest, case.labels)]) for case in dataset.cases]
    return hashlib.sha256(json.dumps([list(dataset.labels.items()), cases]).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def visible(files: Iterable[Path]) -> list[Path]:
    """Sorted, without the ._x that macOS leaves in archives and other hidden files."""
    return sorted(path for path in files if not _hidden(path))


def _description(root: Path) -> dict[str, Any]:
    where = root / "dataset.json"
    if not where.is_file():
        raise UserError(root, "there is no dataset.json, so it is no data set", SEE)
    try:
        description = json.loads(where.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{where}, line {error.lineno}", f"not valid JSON: {error.msg}", "Mend that line.") from error
    except UnicodeDecodeError as error:
        raise UserError(where, "it is not UTF-8 text", "Save it as UTF-8.") from error
    if not isinstance(description, dict):
        raise UserError(where, "it does not hold a JSON object", SEE)
    return description


def _labels(where: Path, description: dict[str, Any]) -> dict[int, str]:
    """Both spellings: {"0": "background"} of the Decathlon and {"background": 0} of nnU-Net."""
    given = _required(where, description, "labels", dict)
    pairs = [(name, value) if isinstance(value, int) else (value, name) for name, value in given.items()]
    try:
        labels = {int(value): str(name) for name, value in pairs}
    except (TypeError, ValueError) as error:
        raise UserError(where, f"'labels' does not pair names and whole numbers: {given}", SEE) from error
    if len(labels) < len(given):
        raise UserError(where, f"two labels have the same value: {given}", "Give every label a value of its own.")
    outside = [value for value in labels if not 0 <= value <= HIGHEST_LABEL]
    if outside:
        what = f"a label has the value {outside[0]}, and labels lie from 0 to {HIGHEST_LABEL}"
        raise UserError(where, what, "Give it another value, here and in the label files.")
    if 0 not in labels:
        raise UserError(where, "'labels' has no background", "Add the background to 'labels', as 0.")
    return dict(sorted(labels.items()))


def _channels(where: Path, description: dict[str, Any]) -> tuple[str, ...]:
    key = "channel_names" if "channel_names" in description else "modality"
    if isinstance(description.get(key), str):
        return (description[key],)
    given = _required(where, description, key, dict)
    numbers = [str(i) for i in range(len(given))]
    if not given or sorted(given) != sorted(numbers):
        raise UserError(where, f"'{key}' does not number the channels from 0: {given}", 'Write, say, {"0": "CT"}.')
    return tuple(str(given[number]) for number in numbers)


def _case(root: Path, entry: Any) -> Case:
    where = root / "dataset.json"
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
        raise UserError(where, f"a training case names no image: {entry}", SEE)
    given = entry.get("label") or []
    labels = [given] if isinstance(given, str) else given
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise UserError(where, f"the 'label' of {entry['image']} is no path and no list of paths: {given}", SEE)
    image = _inside(root, entry["image"])
    return Case(scan_name(image), image, tuple(_inside(root, label) for label in labels))


def _nnunet_cases(root: Path, ending: str, channels: tuple[str, ...]) -> list[Case]:
    if len(channels) > 1:
        advice = "Put the channels of a case into one 4-D file, and list the cases under 'training'."
        raise UserError(root, "nnU-Net's layout with several files an image is not read", advice)
    images = visible((root / "imagesTr").glob(f"*_0000{ending}"))
    names = [image.name.removesuffix(f"_0000{ending}") for image in images]
    labels = [root / "labelsTr" / f"{name}{ending}" for name in names]
    return [Case(name, image, (label,)) for name, image, label in zip(names, images, labels, strict=True)]


def _inside(root: Path, path: str) -> Path:
    """The path under the root, without ./ and ../; links are followed, as many data sets are made of them."""
    relative = os.path.relpath(root / path, root)
    if Path(relative).parts[:1] == (os.pardir,):
        raise UserError(root / "dataset.json", f"{path} leads outside the data set", "Move the file into its folder.")
    return root / relative


def _required(where: Path, description: dict[str, Any], key: str, kind: type) -> Any:
    if key not in description:
        raise UserError(where, f"'{key}' is missing", SEE)
    if not isinstance(description[key], kind):
        raise UserError(where, f"'{key}' is no {'list' if kind is list else 'mapping'}: {description[key]}", SEE)
    return description[key]


def _hidden(path: Path) -> bool:
    return path.name.startswith(".")


def _first(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f", and {len(names) - 5} more" if len(names) > 5 else "")


@contextmanager
def _noting(errors: list[UserError]) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        errors.append(error)
