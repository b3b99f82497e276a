"""Errors about a user's file: one line with the file, the column, the row, what was expected and what was found."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from deploy.errors import DataSetError

__all__ = ["listed", "printable", "refuse", "shown"]

_LISTED = 200  # characters of a list of names in an error
_SHOWN = 60  # characters of a value in an error, so that it fits on a line and long values stay out of logs


def refuse(path: Path, expected: str, found: str, do: str, *, column: str | None = None, row: int | None = None) -> NoReturn:
    """Raise a DataSetError. `row` counts from 0; the message counts from 1, without the header and blank lines."""
    where = [str(path)]
    if column is not None:
        where.append(f"column {column}")
    if row is not None:
        where.append(f"row {row + 1}")
    raise DataSetError(printable(f"{', '.join(where)}: expected {expected}, found {found}. {do}"))


def printable(text: str) -> str:
    """The text on one line, with control characters escaped: names of files and columns may have them."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def shown(value: Any) -> str:
    """A value for an error: null, a number as it is, or text in quotes; cut if it is long."""
    if value is None:
        return "null"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def listed(names: Iterable[str]) -> str:
    """Names for an error; cut if there are many."""
    text = ", ".join(names) or "no column"
    return text if len(text) <= _LISTED else f"{text[: _LISTED - 3]}..."
