"""Errors that a user can mend. Anything else is a bug, and shows its traceback."""

from pathlib import Path


class UserError(Exception):
    """Says where, what, and what to do; the program ends with exit code 2 (or 1 in the company of good scans)."""

    def __init__(self, where: str | Path, what: str, advice: str) -> None:
        self.where, self.what, self.advice = str(where), what, advice
        super().__init__(f"{where}: {what}. {advice}")


def reason(error: BaseException) -> str:
    """One line for a library's exception: its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
