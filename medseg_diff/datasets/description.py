"""What a data set says of its cases, whatever its layout: always a description like the Decathlon's dataset.json."""

import csv
import json
from pathlib import Path
from typing import Any

from medseg_diff.errors import UserError
from medseg_diff.scans.read import KINDS, scan_name

SEE = "data/README.md shows the layouts."
TABLE = "dataset.csv"
HIGHEST_LABEL = 2**15 - 1  # masks are written as int16

Description = dict[str, Any]


def is_dataset(path: Path) -> bool:
    """Whether `check` takes it for a data set, and not for scans."""
    marks = ("dataset.json", TABLE, "imagesTr", "images")
    return path.suffix.lower() == ".csv" or any((path / mark).exists() for mark in marks)


def describe(path: Path, errors: list[UserError]) -> tuple[Path, Description, bool]:
    """Where it is described, the description, whether that covers every file beside a listed one. Raises UserError.

    `training` lists the cases as {"image", "label"}, with "name" and "split" where they are known; an image is a path,
    a list of paths, one a channel, or a mapping from the channel's name; `labels` may lack where not every file is
    covered. What is wrong with single cases is added to `errors`.
    """
    given = path.suffix.lower() == ".csv"
    root, table = (path.parent, path) if given else (path, path / TABLE)
    where = root / "dataset.json"
    description = _read_json(where) if where.is_file() else {}
    if given or (table.is_file() and description.keys().isdisjoint(("training", "dataset", "file_ending"))):
        channels, cases = _read_table(table, errors)
        return table, {"channel_names": channels} | description | {"training": cases}, False
    if "training" in description:
        return where, description, True
    if isinstance(listed := description.get("dataset"), dict):
        return where, description | {"training": _listed_by_nnunet(where, listed)}, True
    if "file_ending" in description:
        return where, description | {"training": _found_by_nnunet(root, description)}, True
    if (root / "images").is_dir():
        return root / "images", {"channel_names": "image"} | description | {"training": _paired(root, errors)}, False
    if description:
        return where, description, True
    raise UserError(path, f"there is no dataset.json, no {TABLE} and no folder images, so it is no data set", SEE)


def labels_of(where: Path, description: Description) -> tuple[dict[int, str], int | None]:
    """Both spellings: {"0": "background"} of the Decathlon and {"background": 0} of nnU-Net; the value to ignore."""
    given = required(where, description, "labels", dict)
    regions = [name for name, value in given.items() if isinstance(value, list)]
    if regions:
        what = f"it declares regions of several labels: {first(regions)}"
        raise UserError(where, what, "Declare every label value by itself; regions are not learned.")
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
    ignored = [value for value, name in labels.items() if name.lower() == "ignore"]
    if 0 not in labels or 0 in ignored:
        raise UserError(where, "'labels' has no background", "Add the background to 'labels', as 0.")
    learned = {value: name for value, name in sorted(labels.items()) if value not in ignored}
    return learned, ignored[0] if ignored else None


def channels_of(where: Path, description: Description) -> tuple[str, ...]:
    """Names of the channels in their order."""
    key = "channel_names" if "channel_names" in description else "modality"
    if isinstance(description.get(key), str):
        return (description[key],)
    given = required(where, description, key, dict)
    numbers = [str(i) for i in range(len(given))]
    if not given or sorted(given) != sorted(numbers):
        raise UserError(where, f"'{key}' does not number the channels from 0: {given}", 'Write, say, {"0": "CT"}.')
    names = tuple(str(given[number]) for number in numbers)
    if len(set(names)) < len(names):
        raise UserError(where, f"two channels have the same name: {', '.join(names)}", "Give each a name of its own.")
    return names


def required(where: Path, description: dict[str, Any], key: str, kind: type) -> Any:
    """A list or a mapping that must be there."""
    if key not in description:
        raise UserError(where, f"'{key}' is missing", SEE)
    if not isinstance(description[key], kind):
        raise UserError(where, f"'{key}' is no {'list' if kind is list else 'mapping'}: {description[key]}", SEE)
    return description[key]


def visible(folder: Path) -> list[Path]:
    """The scans and label maps of a folder, sorted, without the ._x that macOS leaves in archives."""
    found = folder.iterdir() if folder.is_dir() else []
    return sorted(p for p in found if not p.name.startswith(".") and p.name.lower().endswith(tuple(KINDS)))


def first(names: list[str]) -> str:
    """Some names of many."""
    return ", ".join(names[:5]) + (f", and {len(names) - 5} more" if len(names) > 5 else "")


def _read_json(where: Path) -> Description:
    try:
        description = json.loads(where.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{where}, line {error.lineno}", f"not valid JSON: {error.msg}", "Mend that line.") from error
    except UnicodeDecodeError as error:
        raise UserError(where, "it is not UTF-8 text", "Save it as UTF-8.") from error
    except RecursionError as error:
        raise UserError(where, "its brackets are nested too deep", SEE) from error
    if not isinstance(description, dict):
        raise UserError(where, "it does not hold a JSON object", SEE)
    return description


def _listed_by_nnunet(where: Path, listed: Description) -> list[Description]:
    """nnU-Net v2's "dataset": {CASE: {"images": [...], "label": ...}}."""
    if not all(isinstance(case, dict) and "images" in case for case in listed.values()):
        raise UserError(where, "'dataset' does not give every case its 'images'", SEE)
    return [{"name": name, "image": case["images"], "label": case.get("label")} for name, case in listed.items()]


def _found_by_nnunet(root: Path, description: Description) -> list[Description]:
    """nnU-Net v2 lists no cases: imagesTr/CASE_0000.nii.gz, _0001 for the second channel, labelsTr/CASE.nii.gz."""
    ending = str(description["file_ending"])
    images = [path.name for path in visible(root / "imagesTr") if path.name.endswith(ending)]
    names = [image.removesuffix(f"_0000{ending}") for image in images if image.endswith(f"_0000{ending}")]
    count = len(description.get("channel_names", [])) if any(i.endswith(f"_0001{ending}") for i in images) else 1
    return [
        {
            "name": name,
            "image": [f"imagesTr/{name}_{channel:04}{ending}" for channel in range(count)],
            "label": f"labelsTr/{name}{ending}",
        }
        for name in names
    ]


def _paired(root: Path, errors: list[UserError]) -> list[Description]:
    """images/NAME and labels/NAME, each of any kind of file; without a folder labels nothing is labelled."""
    images, labels = ({scan_name(p): str(p.relative_to(root)) for p in visible(root / f)} for f in ("images", "labels"))
    if not (root / "labels").is_dir():
        return [{"image": image} for image in images.values()]
    bare, lost = (
        [own[name] for name in sorted(own.keys() - other)] for own, other in ((images, labels), (labels, images))
    )
    faults = [
        f"{first(names)} {what}" for names, what in ((bare, "without a label"), (lost, "without an image")) if names
    ]
    if faults:
        what = f"images and labels do not pair by name: {'; '.join(faults)}"
        errors.append(UserError(root, what, "Give both files of a case one name, or move what has no partner away."))
    return [{"image": images[name], "label": labels[name]} for name in images.keys() & labels.keys()]


def _read_table(table: Path, errors: list[UserError]) -> tuple[Description, list[Description]]:
    """Channels and cases of a table with one line a case.

    Columns: `image`, or one a channel under its name; `label`, `label_...` for further raters, or several paths with
    ; between them; optionally `case` and `split`.
    """
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            lines = [(reader.line_num, line) for line in reader]
            columns = [name or "" for name in reader.fieldnames or []]
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(table, f"it is no table in UTF-8 with commas ({error})", SEE) from error
    labels = [column for column in columns if column == "label" or column.startswith("label_")]
    channels = [column for column in columns if column not in (*labels, "case", "split")]
    if not channels or "" in columns or len(set(columns)) < len(columns):
        what = f"its first line does not name an image and other columns once each: {', '.join(columns)}"
        raise UserError(table, what, SEE)
    cases = []
    for number, line in lines:
        if None in line or None in line.values() or not all(line[channel].strip() for channel in channels):
            what = f"it does not give {', '.join(channels)}, and as many cells as the first line"
            errors.append(UserError(f"{table}, line {number}", what, "Mend that line."))
            continue
        cells = {column: cell.strip() for column, cell in line.items()}
        paths = [path.strip() for column in labels for path in cells[column].split(";") if path.strip()]
        images = {channel: cells[channel] for channel in channels}
        case = {"image": images["image"] if channels == ["image"] else images, "label": paths}
        cases.append(case | {new: cells[old] for old, new in (("case", "name"), ("split", "split")) if cells.get(old)})
    return {str(i): channel for i, channel in enumerate(channels)}, cases
