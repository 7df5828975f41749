"""A scan to its mask, its uncertainty and a report: `medseg-diff segment`."""

import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from medseg_diff import __version__
from medseg_diff.calibrated import NOMINAL, told
from medseg_diff.checkpoint import Model
from medseg_diff.config import MASK_DENOISERS, SAMPLING
from medseg_diff.console import progress, say, whole
from medseg_diff.denoising import method_of
from medseg_diff.ensemble import nominal_level
from medseg_diff.errors import UserError
from medseg_diff.machine import free_memory_bytes
from medseg_diff.reports import ENDING, earlier_report, write_table
from medseg_diff.scans.dicom_seg import write_dicom_seg
from medseg_diff.scans.find import Source, find_scans, opened
from medseg_diff.scans.preview import draw_preview
from medseg_diff.scans.read import Scan, read_scan
from medseg_diff.scans.rtstruct import write_rtstruct
from medseg_diff.scans.statistics import label_statistics
from medseg_diff.scans.write import NIFTI, mask_suffix, write_label_map, write_nifti, write_seg_nrrd
from medseg_diff.segmentation import Segmentation, drawn, needed_bytes, probability_frames, sample_frames, segment_scan

FILES = {
    "seg": "_seg.nii.gz", "labels": "_label.nii.gz", "prob": "_prob.nii.gz", "uncertainty": "_uncertainty.nii.gz",
    "samples": "_samples.nii.gz", "preview": "_preview.png", "report": ENDING,
    "dicom-seg": "_seg.dcm", "rtstruct": "_rtstruct.dcm", "seg-nrrd": ".seg.nrrd",
}  # fmt: skip
"""What `--save` may ask for, and what follows the scan's name in the file's; masks end as their scan does."""

TOLD_BYTES = 2_000_000_000
"""Scans that need more memory than this are announced with it."""

DICOM_ITEMS = ("dicom-seg", "rtstruct")
DEFAULT_ITEMS = ("seg", "uncertainty", "preview", "report")


def segment_files(
    scans: Sequence[Path],
    model: Model,
    out: Path,
    *,
    samples: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    items: Sequence[str] = DEFAULT_ITEMS,
    series: str | None = None,
    skip_existing: bool = False,
) -> tuple[list[dict[str, Any]], list[UserError]]:
    """Segments every scan that `scans` stand for into `out`: the reports of what is there, and the errors of the rest.

    Folders and archives stand for the scans in them, and their results lie in `out` as these lie in the folder; with
    `series`, a folder is one scan. A refused scan leaves nothing. With `skip_existing`, what has a report of the same
    scan, model and settings is left as it is. Raises UserError for items that this model does not have, and for two
    scans of one name.
    """
    items = tuple(dict.fromkeys(items))
    _check_items(items, model)
    if skip_existing and "report" not in items:
        raise UserError("--skip-existing", "only reports tell what exists", "Add report to --save.")
    config = model.about.config
    samples, steps = drawn(model, samples, steps)
    made_of = {
        "model": {"path": str(model.path), "digest": model.digest, "version": model.about.version},
        "program": __version__,
        "seed": seed,
        "samples": samples,
        "steps": steps,
        "sampler": method_of(config) if samples else None,
        "fuse": config.segment.fuse if config.network.kind in MASK_DENOISERS else None,
        "items": list(items),
    } | ({} if series is None else {"series": series})
    sources = find_scans(list(scans), apart=out) if series is None else [Source(path, path) for path in scans]
    reports: list[dict[str, Any]] = []
    refused: list[UserError] = []
    try:
        for source, part in _each(sources, refused):
            with _refusing(source, refused):
                said = {"scan": str(source.shown)} | made_of
                place = out / source.under
                report = earlier_report(place / (source.name + ENDING), said) if skip_existing else None
                reports.append(report or _segment_file(source, model, place, said, part))
    finally:
        if "report" in items and reports:
            write_table(out, refused)
    return reports, refused


def _each(sources: Sequence[Source], refused: list[UserError]) -> Iterator[tuple[Source, Callable[[float], object]]]:
    """Every scan, those of an archive one by one, and what is to be told of each part of it that is done."""

    def portion(part: Callable[[float], None], count: int) -> Callable[[float], object]:
        return lambda share: part(share / count)

    with progress("segmenting", len(sources)) as advance:
        for source in sources:
            with whole(advance) as part, _refusing(source, refused), opened(source) as held:
                for one in held:
                    yield one, portion(part, len(held))


@contextmanager
def _refusing(source: Source, refused: list[UserError]) -> Iterator[None]:
    """What is wrong with one scan, or more than disk and memory can hold, is noted, and the others go on."""
    try:
        with _told(source):
            yield
    except UserError as error:
        where = error.where.replace(str(source.path), str(source.shown), 1)
        refused.append(UserError(where, error.what, error.advice))
        say(f"refused: {refused[-1]}")


@contextmanager
def _told(source: Source) -> Iterator[None]:
    """What the disk or the memory cannot hold, as a UserError."""
    try:
        yield
    except OSError as error:
        what = f"its results cannot be written ({error.strerror or error})"
        raise UserError(source.path, what, "Free some space, or choose another --out.") from error
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or re.search("out of memory|not enough memory|allocate", str(error))):
            raise
        advice = "Crop the scan, draw fewer --samples, or use another --device."
        raise UserError(source.path, "it needs more memory than there is", advice) from error


def _segment_file(
    source: Source, model: Model, out: Path, made_of: dict[str, Any], part: Callable[[float], object]
) -> dict[str, Any]:
    begin = time.perf_counter()
    scan = read_scan(source.path, len(model.about.channels), made_of.get("series"))
    samples, steps, seed, items = (made_of[key] for key in ("samples", "steps", "seed", "items"))
    bound = [item for item in items if item in DICOM_ITEMS]
    if bound and scan.kind != "dicom":
        what = f"it is no DICOM series, and {' and '.join(bound)} would belong to one"
        raise UserError(scan.path, what, f"Leave {','.join(bound)} out of --save.")
    _check_memory(source, model, scan, samples)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".segment-") as folder:
        aside = Path(folder)
        keep = aside if "samples" in items else None
        found = segment_scan(model, scan, samples=samples, steps=steps, seed=seed, keep=keep, progress=part)
        warnings = list(scan.warnings)
        if bound and not found.label_map.any():
            warnings.append(f"nothing was segmented: no {' and no '.join(bound)} is written")
            items = [item for item in items if item not in bound]
        for warning in warnings:
            say(f"warning: {source.shown}: {warning}")
        if model.about.config.use:
            warnings.append(f"the model is {model.about.config.use}")
        files = {name: (item, value) for item in items for name, value in _files(item, scan, model.about.labels)}
        foreground = [value for value in model.about.labels if value]
        statistics = label_statistics(found.label_map, foreground, scan.array, scan.affine, model.about.channels)
        report = made_of | {
            "seconds": round(time.perf_counter() - begin, 3),
            "warnings": warnings,
            "uncertainty": "1 - probability of the reported label",
            "interval_nominal": _nominal(model, samples, steps),
            "calibration": told(model.about.calibration, samples, steps),
            "labels": [asdict(a) | asdict(b) for a, b in zip(found.labels, statistics, strict=True)],
            "written": [str(out / name) for name in files],
        }
        # Aside first: a scan that fails at its last item leaves nothing, and keeps what an earlier call wrote.
        for name, (item, value) in files.items():
            _write(item, value, found, scan, model, aside / name, report)
        for name in files:
            (aside / name).replace(out / name)
    return report


def _check_memory(source: Source, model: Model, scan: Scan, samples: int) -> None:
    needed, free = needed_bytes(model, scan, samples), free_memory_bytes()
    what = f"it needs up to {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
    if needed > free:
        advice = "Crop it, or use a larger machine."
        if needed_bytes(model, scan, 2) <= free:
            advice = "Draw fewer --samples, or use another --fuse than staple."
        raise UserError(source.path, what, advice)
    if needed > TOLD_BYTES:
        say(f"{source.shown}: {what}")


def _files(item: str, scan: Scan, names: dict[int, str]) -> list[tuple[str, int]]:
    """The file's name, and 0; of `labels` one for each label, with its value and what a file's name can hold of it."""
    if item not in ("seg", "labels"):
        return [(scan.name + FILES[item], 0)]
    stem, suffix = scan.name + FILES[item].removesuffix(NIFTI), mask_suffix(scan)
    if item == "seg":
        return [(stem + suffix, 0)]
    words = {value: re.sub(r"[^A-Za-z0-9]+", "_", name)[:40] for value, name in names.items() if value}
    return [(f"{stem}_{value}_{word}{suffix}", value) for value, word in words.items()]


def _write(
    item: str, value: int, found: Segmentation, scan: Scan, model: Model, path: Path, report: dict[str, Any]
) -> None:
    names, values = model.about.labels, list(model.about.labels)
    foreground = {value: name for value, name in names.items() if value}
    match item:
        case "seg":
            write_label_map(found.label_map, scan, path)
        case "labels":
            write_label_map((found.label_map == value).astype(np.uint8), scan, path)
        case "uncertainty":
            write_nifti([found.uncertainty], scan, path, np.float32)
        case "prob":
            frames = probability_frames(found.prediction, found.affine, scan)
            write_nifti(frames, scan, path, np.float32, count=len(values))
        case "samples":
            frames = sample_frames(found, values, scan)
            write_nifti(frames, scan, path, found.label_map.dtype, count=report["samples"])
        case "preview":
            draw_preview(scan.array[0], found.label_map, found.uncertainty, scan.affine, foreground, path, scan.name)
        case "report":
            path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
        case "dicom-seg":
            write_dicom_seg(found.label_map, scan, foreground, path, model.about.config.data.codes)
        case "rtstruct":
            write_rtstruct(found.label_map, scan, foreground, path)
        case "seg-nrrd":
            write_seg_nrrd(found.label_map, scan, foreground, path, model.about.config.data.codes)


def _nominal(model: Model, samples: int, steps: int) -> float | None:
    fitted = model.about.calibration
    if fitted is not None and fitted.factors(samples, steps):
        return NOMINAL
    return round(nominal_level(samples), 3) if samples else None


def _check_items(items: Sequence[str], model: Model) -> None:
    unknown = [item for item in items if item not in FILES]
    if unknown or not items:
        what = f"there is no item {', '.join(unknown)}" if unknown else "it names no item"
        raise UserError(f"--save {','.join(items)}", what, f"Choose from {','.join(FILES)}.")
    if "samples" in items and model.about.config.network.kind not in SAMPLING:
        raise UserError("--save samples", "this model is deterministic, it draws no samples", "Leave samples out.")
