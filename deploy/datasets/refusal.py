"""Refusing a file of a user's: one line that names the file, the column, the row, what was expected, what was found."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from deploy.errors import DataSetError

__all__ = ["listed", "printable", "refuse", "shown"]

_LISTED = 200  # characters of columns' names in an error
_SHOWN = 60  # characters of a value in an error: one line on a terminal, and no customer's data in full in a log


def refuse(path: Path, expected: str, found: str, do: str, *, column: str | None = None, row: int | None = None) -> NoReturn:
    """Raise the error. `row` counts from 0 as arrays do; people read it from 1, without the header and blank lines."""
    where = [str(path)]
    if column is not None:
        where.append(f"column {column}")
    if row is not None:
        where.append(f"row {row + 1}")
    raise DataSetError(printable(f"{', '.join(where)}: expected {expected}, found {found}. {do}"))


def printable(text: str) -> str:
    """On one line, whatever a file, a column or a value is called."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def shown(value: Any) -> str:
    """A value for an error's text: null, a number as it is, text in quotes, cut where it is long."""
    if value is None:
        return "null"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def listed(names: Iterable[str]) -> str:
    """Columns' names for an error's text, cut where they are many."""
    text = ", ".join(names) or "no column"
    return text if len(text) <= _LISTED else f"{text[: _LISTED - 3]}..."
