"""Turns every error into what a user reads: one line on stderr, and an exit code.

Our own errors carry their line already. For errors of libraries, the line is written here: the object, what was expected, what
was found, what to do. Any other error is a bug, and its line says so. `HEADRACE_TRACEBACK=1` prints every error's traceback.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import click

from deploy.cli.standard_streams import STDOUT

__all__ = ["EXIT_BUG", "EXIT_CODES", "EXIT_INTERRUPTED", "EXIT_PIPE", "Failure", "explained", "telling"]

EXIT_BUG = 70  # EX_SOFTWARE of sysexits.h
EXIT_INTERRUPTED = 128 + 2  # SIGINT
EXIT_PIPE = 128 + 13  # SIGPIPE

EXIT_CODES = {  # docs/cli.md
    0: "success. Also when Ctrl-C or SIGTERM ends a command that runs until then (a worker, `watermarks`, `scores tail`), or "
    "ends a `replay` or `simulate` in order",
    1: "an error that its line explains: Kafka, a setting, a file, a package; in an installation of the wheel, which holds the "
    "client alone, every command. Also: a check found something (`config check`, `topics check`, `doctor`, `snapshot verify`, "
    "`kafka status`), `snapshot gc` or `snapshot reindex` left something alone, or a question was answered with no",
    2: "wrong usage",
    3: "not every live scorer confirmed a rollback, a resume or the stop of a canary in time, or one has been silent for less "
    "than 5 minutes; what was written stands",
    4: "`snapshot watch`: the candidate was taken back, or its trial was stopped",
    5: "`snapshot watch`: `--timeout` was over before the trial ended",
    6: "`snapshot gate`: the gate withholds what is learned",
    EXIT_BUG: "an unexpected error: a bug",
    EXIT_INTERRUPTED: "Ctrl-C",
    EXIT_PIPE: "the reader of the output has ended, as `head -1` does after one line",
}

# The modules of our own errors, one family in each room; their text is the line that a user reads.
OWN = ("deploy.errors", "headrace.errors", "model.errors", "state.errors", "stream.errors")
LONGEST = 600  # characters of a library's message, some of which are pages long

# What to do about an error of the operating system. For all others: check the path.
CURES = {
    errno.ENOSPC: "Free space on that disk, or use another one",
    errno.EDQUOT: "Free space within the quota, or use another disk",
    errno.EFBIG: "Raise the limit of file sizes (`ulimit -f`)",
    errno.EROFS: "Use a folder on a disk that can be written",
    errno.EACCES: "Give this user the right to it, or use another folder",
    errno.EPERM: "Give this user the right to it, or use another folder",
    errno.EMFILE: "Raise the limit of open files (`ulimit -n`)",
    errno.ENFILE: "Close other programs, or raise the system's limit of open files (fs.file-max)",
    errno.ENOMEM: "Free memory, or give this process more",
    errno.EIO: "Look at the system's log: the disk may be failing",
    errno.EADDRINUSE: "Take another port, or 0 for a free one",
}


class Failure(click.ClickException):
    """An error line and an exit code. click prints the line and ends the process with the code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def show(self, file: object = None) -> None:
        """Print a line `Error: …` for each line of the message."""
        for line in self.message.splitlines():
            click.echo(f"Error: {line}", err=True)


@contextlib.contextmanager
def telling(context: click.Context | None = None) -> Iterator[None]:
    """Run a command: every error becomes a `Failure`, and all output is flushed before the end."""
    try:
        yield
        sys.stdout.flush()  # here, since at the end of the process a failure could no longer change the exit code
    except (click.ClickException, click.exceptions.Exit):
        raise
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich turns it into a SystemExit with code 1
            raise Failure("", EXIT_PIPE) from error
        raise
    except KeyboardInterrupt as error:
        raise Failure("", EXIT_INTERRUPTED) from error
    except click.Abort as error:
        # click turns Ctrl-C at a question into an Abort, too, and keeps the KeyboardInterrupt as its context.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise Failure("", EXIT_INTERRUPTED) from error
        raise
    except BrokenPipeError as error:
        if error.filename != STDOUT:
            raise Failure(_os_error(error), 1) from error
        raise Failure("", EXIT_PIPE) from error
    except (Exception, asyncio.CancelledError) as error:
        if os.environ.get("HEADRACE_TRACEBACK"):
            traceback.print_exception(error)
        line = explained(error)
        if line is not None:
            raise Failure(line, 1) from error
        command = context.invoked_subcommand if context is not None else None
        raise Failure(_bug(f"headrace {command or ''}".rstrip(), error), EXIT_BUG) from error


def explained(error: BaseException) -> str | None:
    """The line that a user reads; None for an error that isn't expected, a bug."""
    families = {(each.__module__.split(".")[0], each.__name__) for each in type(error).__mro__}
    if any(each.__module__ in OWN for each in type(error).__mro__):
        return str(error)
    if isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        return explained(error.exceptions[0])
    if isinstance(error, ImportError):
        return _import_error(error)
    if {("kafka", "KafkaError"), ("aiokafka", "KafkaError")} & families:
        return (
            f"Kafka: expected an answer, found {_shown(error)}. Look at the brokers' logs and `headrace doctor`; "
            "kafka.bootstrap_servers and the security settings: `headrace config show`."
        )
    if isinstance(error, OSError):
        return _os_error(error)
    if isinstance(error, MemoryError):
        return "memory: expected enough for this command, found none left. Give the process more, or ask for less at a time."
    if isinstance(error, UnicodeDecodeError):
        return (
            f"text that was read: expected UTF-8, found the byte 0x{error.object[error.start]:02x} at position {error.start}. "
            "Convert the file (`iconv -t UTF-8`)."
        )
    if isinstance(error, EOFError):
        return f"a file that was read: expected more of it, found its end ({_shown(error)}). Get it again."
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return "HOME: expected the user's home folder, found none. Set HOME, or use absolute paths instead of `~`."
    return None


def _bug(command: str, error: BaseException) -> str:
    return (
        f"{command}: expected no such error, found {_shown(error)}. This is a bug in Headrace: please report it with the "
        "output of the same command under HEADRACE_TRACEBACK=1."
    )


def _shown(error: BaseException) -> str:
    name, text = type(error).__name__, " ".join(str(error).split())
    if not text:
        return name
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
    return text if text.startswith(name) else f"{name}: {text}"


def _import_error(error: ImportError) -> str | None:
    package = (error.name or "").split(".")[0]
    if package in ("deploy", "headrace", "model", "state", "stream"):
        return None
    found = "none" if isinstance(error, ModuleNotFoundError) else f"one that can't be loaded ({_shown(error)})"
    return (
        f"Python package {package or 'of the workers'}: expected it for this command, found {found}. Run `make setup` in "
        "the checkout, which installs what workers and commands need."
    )


def _os_error(error: OSError) -> str:
    if error.errno == errno.ENOENT and not _has_folder():
        return "the current folder: expected it to exist, found that it was deleted. Change to another folder (`cd`)."
    where = " to ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    found = error.strerror or _shown(error)
    if where == STDOUT:
        expected = "expected to write the output"
    elif not where:
        where = "a connection" if isinstance(error, (ConnectionError, TimeoutError)) else "the system"
        expected = "expected to be answered" if where == "a connection" else "expected to read or write"
    else:
        expected = "expected to open, read or write it"
    cure = CURES.get(error.errno or 0, "Check the path" if error.filename is not None else "Check what it needs")
    return f"{where}: {expected}, found: {found}. {cure}."


def _has_folder() -> bool:
    try:
        Path.cwd()
    except OSError:
        return False
    return True
