"""stdin, stdout and stderr as every command may take them for granted, whatever the terminal or supervisor gives."""

from __future__ import annotations

import io
import os
import sys
from typing import Any, TextIO

__all__ = ["STDOUT", "prepare"]

STDOUT = "stdout"  # the file name that errors of writing the output carry


def prepare() -> None:
    """Make all three usable; called once, by the process that is the command.

    - One that is closed (`headrace … >&-`) becomes /dev/null. A file opened later could otherwise take its number, and get what
      a library prints.
    - A character that the encoding of stdout or stderr lacks (in Latin-1, say) is written as an escape, as in Python's
      own tracebacks. Documents for machines (JSON, TOML) are UTF-8 in any case: `deploy.cli.common.echo_document`.
    - An error of writing to stdout carries the name `stdout`: a full disk under it is told from a full disk elsewhere. What
      stderr can't take is dropped, since there is nowhere left to complain; the exit code still speaks.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 (it lives as long as the process)
    sys.stdout = _text(_Named(1, "w", closefd=False), sys.stdout)
    sys.stderr = _text(_Dropping(2, "w", closefd=False), sys.stderr)


class _Named(io.FileIO):
    """stdout, whose first error says so. What comes after that is dropped: Python would try it again at the end."""

    failed = False

    def write(self, data: Any, /) -> int:
        try:
            return memoryview(data).nbytes if self.failed else super().write(data)
        except OSError as error:
            self.failed = True
            raise OSError(error.errno, error.strerror, STDOUT) from None


class _Dropping(io.FileIO):
    """stderr, which has no errors."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def _text(raw: io.FileIO, like: TextIO | None) -> TextIO:
    encoding = "utf-8" if like is None else like.encoding
    buffered = raw.fileno() == 1 and not raw.isatty()
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=encoding, errors="backslashreplace", line_buffering=not buffered, write_through=False
    )
