"""Talk and progress on stderr; results are for stdout."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

TERMINAL = Console(stderr=True)
"""One for all bars: those of a loop within a loop stand below each other."""


def say(text: str) -> None:
    """A line on stderr, with control characters made visible: file names may hold anything."""
    print("".join(c if c.isprintable() else repr(c)[1:-1] for c in text), file=sys.stderr, flush=True)


@contextmanager
def progress(what: str, total: int | float) -> Iterator[Callable[..., None]]:
    """A bar with the time left, where stderr is a terminal. Yields advance(by=1, note="")."""
    if not sys.stderr.isatty():
        yield lambda by=1.0, note="": None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=TERMINAL, transient=True) as bar:
        task = bar.add_task(what, total=total, note="")
        yield lambda by=1.0, note="": bar.update(task, advance=by, note=note)


@contextmanager
def whole(advance: Callable[..., None]) -> Iterator[Callable[[float], None]]:
    """One unit of a bar, advanced by parts of it; what is left of it when it ends, refused or done, follows."""
    left = 1.0

    def part(share: float) -> None:
        nonlocal left
        left -= share
        advance(share)

    yield part
    advance(left)


def outline(values: dict[str, Any], indent: int = 0) -> str:
    """Nested values as indented lines."""
    lines = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += [f"{'  ' * indent}{key}:", outline(value, indent + 1)]
        else:
            shown = ", ".join(map(_short, value)) if isinstance(value, list) else _short(value)
            lines.append(f"{'  ' * indent}{key}: {shown}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
