"""Tables for people, on terminals of any width: no value is ever cut, and the first column is never folded.

If the rows are wider than the terminal, the last column is folded. If that isn't enough, each record becomes a block of lines.
In a file or a pipe, each record is one line, however long.
"""

from __future__ import annotations

import io
import os
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any, Literal

import click

from deploy.cli.common import on_terminal

__all__ = ["print_pairs", "print_table", "printable", "styled"]

LEAST_FOLDED = 20  # characters: text folded into a narrower column can hardly be read
GAP = "  "


def print_table(names: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Print rows under the names of their columns. The first column identifies the record; the last may be a sentence.

    Args:
        right: names of the columns to align to the right, such as numbers.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = [[printable(value) for value in row] for row in rows]
    widths = [max(cell_len(value) for value in column) for column in zip(names, *rows, strict=True)]
    whole = sum(widths) + len(GAP) * (len(names) - 1)
    width = _width(whole)
    if whole > width and whole - widths[-1] + min(LEAST_FOLDED, widths[-1]) > width:
        for row in rows:
            click.echo(styled(f"{names[0]} {row[0]}", bold=True))
            _print_folded(list(zip(names[1:], row[1:], strict=True)), width, indent=GAP)
        return
    table = Table(box=None, pad_edge=False, padding=(0, len(GAP), 0, 0), header_style="bold")
    for name, taken in zip(names, widths, strict=True):
        side: Literal["left", "right"] = "right" if name in right else "left"
        if name == names[-1]:
            table.add_column(name, overflow="fold", justify=side)
        else:
            table.add_column(name, no_wrap=True, min_width=taken, justify=side)
    for row in rows:
        table.add_row(*(Text(value) for value in row))  # as Text: brackets in a reason are not markup
    out = io.StringIO()
    # With a height too: given a width alone, rich uses 80 columns on a dumb terminal.
    Console(file=out, width=max(width, 1), height=25, force_terminal=on_terminal(), highlight=False).print(table)
    click.echo("\n".join(line.rstrip() for line in out.getvalue().splitlines()))


def print_pairs(pairs: Sequence[tuple[str, Any]], title: str = "") -> None:
    """Print names and values, one pair a line; long values are folded."""
    if title:
        click.echo(styled(title, bold=True))
    _print_folded([(name, printable(str(value))) for name, value in pairs], _width(1 << 20), bold=True)


def styled(text: str, **how: Any) -> str:
    """The text in colour or bold, by `click.style`; plain on a dumb terminal, which would show the control codes."""
    return text if os.environ.get("TERM") in ("dumb", "unknown") else click.style(text, **how)


def printable(text: str) -> str:
    """The text on one line, with control characters escaped."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def _print_folded(pairs: Sequence[tuple[str, str]], width: int, *, indent: str = "", bold: bool = False) -> None:
    taken = max(len(name) for name, _ in pairs)
    hanging = len(indent) + taken + len(GAP)
    beside = hanging + LEAST_FOLDED <= width
    for name, value in pairs:
        left = hanging if beside else len(indent) + 2 * len(GAP)
        # The terminal wraps words longer than a line (hashes, paths): folded here, they could not be copied.
        room = max(width - left, LEAST_FOLDED // 2)
        lines = textwrap.wrap(value, room, break_long_words=False, break_on_hyphens=False) or [""]
        shown = styled(name, bold=True) if bold else name
        one_word = " " not in value  # a number or a name, which may identify a record: keep it beside its name
        if beside or one_word or len(indent) + len(name) + len(GAP) + len(value) <= width:
            space = " " * (taken - len(name) if beside else 0)
            click.echo(f"{indent}{shown}{space}{GAP}{lines[0]}".rstrip())
            lines = lines[1:]
        else:
            click.echo(f"{indent}{shown}")
        for line in lines:
            click.echo(" " * left + line)


def _width(whole: int) -> int:
    """The width to print in: the terminal's, or `whole` where the output isn't a terminal."""
    return shutil.get_terminal_size().columns if on_terminal() else whole
