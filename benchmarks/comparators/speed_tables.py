"""The page and the figure of speed.py."""

from pathlib import Path
from statistics import median
from textwrap import fill
from typing import Any

import numpy as np

from medseg_diff.figures import Panel, draw_lines

THEIR_STEPS, THEIR_SAMPLES = 1000, 5
"""MedSegDiff's own defaults."""


def page(found: dict[str, dict[str, Any]], repeats: int) -> str:
    sections = {"sampling": of_sampling, "training": of_training, "volumes": of_volumes}
    sections |= {"medsegdiff": of_medsegdiff, "growth": of_growth}
    made = {key: ", ".join(sorted({part[key] for part in found.values()})) for key in ("commit", "torch", "machine")}
    newline = "\n"
    return f"""# Speed

One thread, CPU seconds, medians of turns ({repeats} where a ratio is stated, after one that does not count). Networks
are untrained: time does not depend on the weights.

{newline.join(make(found[part]) for part, make in sections.items() if part in found)}
Made by `.venv/bin/python benchmarks/speed.py --data FOLDER`; commit {made["commit"]}, torch {made["torch"]},
{made["machine"]}.
"""


def of_sampling(part: dict[str, Any]) -> str:
    lines = []
    for name, values in part["volumes"].items():
        ratios = [(ours - unet) / unet for ours, unet in zip(values["ours"], values["unet"], strict=True)]
        unet, ours = (median(values[key]) for key in ("unet", "ours"))
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        lines.append(f"| {name} | {unet:.3f} | {ours:.3f} | **{median(ratios):.2f}** | {spread} |")
    return table(
        "What 16 samples cost",
        "Beyond one pass of the deterministic U-Net over the same volume, which gives no samples, in such passes.",
        ("volume", "U-Net, s", "ours with 16 samples, s", "more, in passes", "range"),
        lines,
    )


def of_training(part: dict[str, Any]) -> str:
    lines = [
        f"| {name} | {part['batch'] / median(values):.1f} | {median(values):.3f} |"
        for name, values in part["seconds"].items()
    ]
    return table(
        "Training",
        f"Slices a second at patch {part['patch'][0]} x {part['patch'][1]}, batch {part['batch']}, with the loading of"
        " data. nnU-Net's trainer has its own, larger network and computes in fp32 on a CPU; ours takes bf16 where the"
        " processor is fast in it.",
        ("trainer", "slices a second", "seconds a step"),
        lines,
    )


def of_volumes(part: dict[str, Any]) -> str:
    lines = [f"| {name} | {median(values):.2f} |" for name, values in part["seconds"].items()]
    text = "From the file of a Task04 volume to mask and probabilities; nnU-Net with overlapping windows and mirroring."
    return table("A volume", text, ("method", "seconds"), lines)


def of_medsegdiff(part: dict[str, Any]) -> str:
    two, four, flat, whole = (median(values) for values in part["seconds"].values())
    step, slices = (four - two) / 2, part["slices"]
    theirs = (two + (THEIR_STEPS - 2) * step) / slices
    lines = [f"| MedSegDiff V2, {THEIR_STEPS} steps x {THEIR_SAMPLES} samples, extrapolated | {theirs:.2f} | 1 |"]
    for name, seconds in (("ours in 2D, 16 samples", flat / slices), ("ours in 3D, 16 samples", whole / slices)):
        lines.append(f"| {name} | {seconds:.4f} | 1 / {theirs / seconds:.0f} |")
    text = (
        f"MedSegDiff's default, {THEIR_STEPS} steps and {THEIR_SAMPLES} samples, by our medsegdiff_v2 network at its"
        " default configuration: timed at 2 and at 4 steps and extrapolated along the line through both."
    )
    return table("A slice", text, ("method", "seconds a slice", "share"), lines)


def of_growth(part: dict[str, Any]) -> str:
    lines = []
    for what, first in (("samples", "1"), ("steps", "1"), ("slices", "8"), ("classes", "2")):
        values = {n: median(seconds) for n, seconds in part[what].items()}
        cells = ", ".join(f"{n}: {s:.3f} ({s / values[first]:.2f} x)" for n, s in values.items())
        lines.append(f"| {what} | {cells} |")
    text = (
        "Seconds for a volume with 16 samples, 1 step, 3 classes, in 3D, but for what grows; slices in 2D.\n\n"
        "![growth](speed.png)"
    )
    return table("Growth", text, ("", "seconds"), lines)


def table(title: str, text: str, head: tuple[str, ...], lines: list[str]) -> str:
    rows = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *lines]
    wrapped = "\n\n".join(fill(paragraph, 118) for paragraph in text.split("\n\n"))
    return "\n".join([f"## {title}", "", wrapped, "", *rows, ""])


def draw(part: dict[str, Any], path: Path) -> None:
    panels = []
    for what in ("samples", "steps", "slices", "classes"):
        numbers, seconds = [float(n) for n in part[what]], [median(values) for values in part[what].values()]
        curves = {"ours": (numbers, seconds)}
        proportional = {"proportional": (numbers, (np.array(numbers) * seconds[0] / numbers[0]).tolist())}
        panels.append(Panel(f"more {what}", what, "CPU seconds a volume", curves, proportional, log="xy"))
    draw_lines(panels, path)
