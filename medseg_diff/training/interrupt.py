"""SIGINT and SIGTERM as a wish that training meets after the step it is in."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """Within `with Interrupt() as interrupt`, `interrupt.requested` is the signal that came, or 0."""

    def __init__(self) -> None:
        self.requested = 0
        self._at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """For work that can be done again: a signal within it, or one that came before, ends the program."""
        self._at_once = True
        try:
            if self.requested:
                raise SystemExit(128 + self.requested)
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = number
        if self._at_once:
            raise SystemExit(128 + number)
