"""Makes stdin, stdout and stderr usable for every command, whatever the terminal or supervisor provides."""

from __future__ import annotations

import io
import os
import sys
from typing import Any, TextIO

__all__ = ["STDOUT", "prepare"]

STDOUT = "stdout"  # the file name in errors of writing to stdout


def prepare() -> None:
    """Prepare all three streams. The process of a command calls this once.

    - A closed stream (`headrace … >&-`) becomes /dev/null. Otherwise a file opened later could take its number, and a library's
      output would go into that file.
    - A character that the encoding of stdout or stderr lacks (Latin-1, for example) is written as an escape, as in Python's
      own tracebacks. Documents for machines (JSON, TOML) are always UTF-8: `deploy.cli.common.echo_document`.
    - An error of writing to stdout has the file name `stdout`, which tells a full disk below stdout from a full disk elsewhere.
    - Output that stderr can't take is dropped, since no stream is left to report that. The exit code still does.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 (it lives as long as the process)
    sys.stdout = _text(_Named(1, "w", closefd=False), sys.stdout)
    sys.stderr = _text(_Dropping(2, "w", closefd=False), sys.stderr)


class _Named(io.FileIO):
    """stdout. Its first error names it; later output is dropped, since Python would try to write it again at the end."""

    failed = False

    def write(self, data: Any, /) -> int:
        try:
            return memoryview(data).nbytes if self.failed else super().write(data)
        except OSError as error:
            self.failed = True
            raise OSError(error.errno, error.strerror, STDOUT) from None


class _Dropping(io.FileIO):
    """stderr. It raises no errors."""

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
