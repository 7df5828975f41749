"""Label maps in two folders, matched by name."""

from pathlib import Path

from medseg_diff.datasets.layouts import survey
from medseg_diff.errors import UserError
from medseg_diff.scans.find import find_scans
from medseg_diff.scans.read import scan_name


def matched(predictions: Path, references: Path) -> dict[str, tuple[Path, Path]]:
    """A name's prediction and reference, the former with or without `_seg`. Raises UserError where one is missing."""
    found, wanted = ({_stem(path): path for path in _maps(folder)} for folder in (predictions, references))
    if not wanted:
        raise UserError(references, "it holds no label maps", "Name a folder of NIfTI, NRRD or MHA files.")
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise UserError(predictions, f"it has no mask for {listed}", "Give every reference a mask of the same name.")
    return {name: (found[name], wanted[name]) for name in sorted(wanted)}


def label_names(references: Path, found: set[int]) -> dict[int, str]:
    """Names from a data set's description beside the references, else the values themselves."""
    values = sorted(found - {0})
    for folder in (references, references.parent):
        if (folder / "dataset.json").is_file():
            known = survey(folder)[0].labels
            return {0: "background"} | {value: known.get(value, str(value)) for value in values}
    return {0: "background"} | {value: str(value) for value in values or [1]}


def _maps(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(folder, "there is no such folder", "Name the folder that holds the label maps.")
    other = ("_uncertainty", "_prob", "_samples", "_preview")
    found = [scan.path for scan in find_scans([folder]) if scan.under == Path()]
    return [path for path in found if path.is_file() and not scan_name(path).endswith(other)]


def _stem(path: Path) -> str:
    return scan_name(path).removesuffix("_seg")
