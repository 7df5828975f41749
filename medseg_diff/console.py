"""Talk and progress on stderr; results are for stdout."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def say(text: str) -> None:
    """A line on stderr, with control characters made visible: file names may hold anything."""
    print("".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text), file=sys.stderr, flush=True)


@contextmanager
def progress(what: str, total: float) -> Iterator[Callable[..., None]]:
    """A bar with the time left, where stderr is a terminal. Yields advance(by=1, note="")."""
    if not sys.stderr.isatty():
        yield lambda by=1.0, note="": None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total, note="")
        yield lambda by=1.0, note="": bar.update(task, advance=by, note=note)
