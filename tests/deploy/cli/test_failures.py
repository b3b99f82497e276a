"""What an exception becomes: a line, and an exit code."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import aiokafka.errors
import click
import kafka.errors
import pytest
from click.testing import CliRunner

from deploy.cli import LazyGroup
from deploy.cli.failures import explained
from deploy.errors import FeedError
from state.errors import SnapshotError
from stream.errors import TopicError


@click.group(cls=LazyGroup)
def cli() -> None:
    """A command line for one test."""


def ends(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Exit code and stderr of a command that raises."""

    @click.command()
    def fail() -> None:
        raise error

    monkeypatch.setattr(LazyGroup, "get_command", lambda *_: fail)
    result = CliRunner().invoke(cli, ["fail"])
    return result.exit_code, result.stderr


def of_system(number: int, *names: str) -> OSError:
    try:
        raise OSError(number, "words of the system", *names)
    except OSError as error:
        return error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (TopicError("the line"), "the line"),
        (SnapshotError("the line"), "the line"),
        (FeedError("the line"), "the line"),
        (ExceptionGroup("of a task group", [FeedError("the line")]), "the line"),
        (
            of_system(errno.ENOSPC, "/data/x"),
            "/data/x: expected to open, read or write it, found: words of the system. Free space on that disk, or use another",
        ),
        (
            of_system(errno.EACCES, "/data/x"),
            "/data/x: expected to open, read or write it, found: words of the system. Give this user the right to it, or use "
            "another folder.",
        ),
        (of_system(errno.ENOENT, "x"), "x: expected to open, read or write it, found: words of the system. Check the path."),
        (
            of_system(errno.EROFS, "a"),
            "a: expected to open, read or write it, found: words of the system. Use a folder on a disk",
        ),
        (of_system(errno.EMFILE), "the system: expected to read or write, found: words of the system. Raise the limit of open"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), "a connection: expected to be answered, found: reset. Check what it"),
        (TimeoutError(), "a connection: expected to be answered, found: TimeoutError. Check what it needs."),
        (
            ModuleNotFoundError("x", name="faust.app"),
            "Python package faust: expected it for this command, found none. Run `make setup`",
        ),
        (
            ImportError("libcudart.so.12", name="torch"),
            "Python package torch: expected it for this command, found one that can't",
        ),
        (
            aiokafka.errors.NotLeaderForPartitionError("x"),
            "Kafka: expected an answer, found NotLeaderForPartitionError: [Error 6] NotLeader",
        ),
        (kafka.errors.UnsupportedCodecError("zstd"), "Kafka: expected an answer, found UnsupportedCodecError: zstd. Look at"),
        (MemoryError(), "memory: expected enough for this command, found none left. "),
        (
            UnicodeDecodeError("utf-8", b"a\xe9", 1, 2, "x"),
            "text that was read: expected UTF-8, found the byte 0xe9 at position 1.",
        ),
        (EOFError("Compressed file ended"), "a file that was read: expected more of it, found its end (EOFError: Compressed"),
        (RuntimeError("Could not determine home directory."), "HOME: expected the user's home folder, found none. Set HOME,"),
    ],
)
def test_errors_that_are_explained(error: Exception, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, err = ends(error, monkeypatch)
    assert code == 1
    assert err.startswith(f"Error: {line}")
    assert len(err.splitlines()) == 1


BUGS = [
    ZeroDivisionError("division\nby zero"),
    KeyError("a"),
    ImportError("x", name="stream.gone"),
    asyncio.CancelledError("x"),
]


@pytest.mark.parametrize("error", BUGS, ids=repr)
def test_a_bug_says_that_it_is_one(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    assert explained(error) is None
    code, err = ends(error, monkeypatch)
    assert code == 70
    assert len(err.splitlines()) == 1
    assert f"Error: headrace fail: expected no such error, found {type(error).__name__}: " in err
    assert "This is a bug in Headrace: please report it with the output of the same command under HEADRACE_TRACEBACK=1." in err
    monkeypatch.setenv("HEADRACE_TRACEBACK", "1")
    assert "Traceback (most recent call last)" in ends(error, monkeypatch)[1]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (click.Abort(), 1),
        (click.UsageError("x"), 2),
        (SystemExit(3), 3),
        (click.exceptions.Exit(1), 1),
    ],
)
def test_other_ends(error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ends(error, monkeypatch)[0] == code


def test_an_interrupt_at_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def ask() -> None:
        click.confirm("Sure?", abort=True)

    def interrupted(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(LazyGroup, "get_command", lambda *_: ask)
    assert CliRunner().invoke(cli, ["ask"], input="n\n").exit_code == 1
    monkeypatch.setattr(click.termui, "visible_prompt_func", interrupted)
    assert CliRunner().invoke(cli, ["ask"], standalone_mode=True).exit_code in (1, 130)


def test_a_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert explained(FileNotFoundError(errno.ENOENT, "No such file")) == (
        "the current folder: expected it to exist, found that it was deleted. Change to another folder (`cd`)."
    )
