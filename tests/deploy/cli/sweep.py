"""Runs the command line in broken environments: each case is a process of its own, forked from one that has imported all.

A start of Python and of torch costs seconds of CPU, a fork some milliseconds, and there are hundreds of cases. The rest is as
in a real process: file descriptors, folder, environment, limits, user, signals and exit code.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import psutil

__all__ = ["Case", "Ended", "black_hole", "commands", "run_all"]

PRELOAD = ["tests.deploy.cli.sweep", "tests.deploy.cli.sweep_imports"]
AT_ONCE = 8
# A case that takes longer hangs: every wait of a command for Kafka is set to less than a second.
LIMIT_S = 40.0
PIPE_BYTES = 1 << 20
# A start of multiprocessing's looks at every other process, too, and two threads must not look at one.
LOCK = threading.Lock()
OURS = ("deploy", "headrace", "model", "state", "stream")


@dataclass(frozen=True)
class Case:
    """A command line and what its process finds; every field has a name that the machine of a user may have."""

    args: tuple[str, ...]
    folder: Path
    """Working folder; what is printed lies beside it."""
    env: dict[str, str | None] = field(default_factory=dict)
    """None removes a variable."""
    stdout: str = "file"
    """file, full (/dev/full), pipe (whose reader has gone) or closed."""
    encoding: str = "utf-8"
    without: tuple[str, ...] = ()
    """Packages that can't be imported."""
    folder_gone: bool = False
    file_bytes: int | None = None
    """Largest file that can be written."""
    user: int | None = None
    interrupt: Callable[[], None] | None = None
    """Returns when SIGINT is to be sent."""
    interrupts: int = 1

    @property
    def name(self) -> str:
        return " ".join(self.args)


@dataclass(frozen=True)
class Ended:
    """How a case ended."""

    case: Case
    code: int | None
    """None: it had to be killed."""
    out: bytes
    err: str
    seconds: float
    left: list[str]
    """Processes that it left behind."""


def commands(group: click.Group, context: click.Context, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command of the tree, without those that only hold others."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, context, (*before, name))
        else:
            yield (*before, name)


def run_all(cases: Sequence[Case]) -> list[Ended]:
    """Run them, some at a time, in the order given."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda case: _run(context, case), cases))


@contextlib.contextmanager
def black_hole() -> Iterator[tuple[str, threading.Event]]:
    """A listener that takes connections and never answers: its address, and an event that is set by the first connection."""
    held, taken = [], threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    held.append(listener.accept()[0])
                    taken.set()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}", taken
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    for connection in held:
        connection.close()


def _run(context: Any, case: Case) -> Ended:
    told = Path(tempfile.mkdtemp(dir=case.folder.parent))
    pipes = [_pipe(told / name) for name in ("out", "err")]
    began = time.monotonic()
    process = context.Process(target=_live, args=(replace(case, interrupt=None), str(told)))
    with LOCK:
        process.start()
    if case.interrupt is not None:
        case.interrupt()
        for _ in range(case.interrupts):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)
            time.sleep(0.3)
    while (code := _exit_code(process)) is None and time.monotonic() - began < LIMIT_S:
        time.sleep(0.01)
    seconds = time.monotonic() - began
    if code is None:
        process.kill()
    left = _session(process.pid)
    out, err = (_drained(pipe) for pipe in pipes)
    shutil.rmtree(told)
    return Ended(case, code, out, err.decode(errors="replace"), seconds, left)


def _exit_code(process: Any) -> int | None:
    with LOCK:
        code: int | None = process.exitcode
    return code


def _pipe(path: Path) -> int:
    """A pipe by name that holds all that a command prints; files would be under its limits, too."""
    os.mkfifo(path)
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reading, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return reading


def _drained(reading: int) -> bytes:
    found = b""
    with contextlib.suppress(BlockingIOError):
        while data := os.read(reading, PIPE_BYTES):
            found += data
    os.close(reading)
    return found


def _session(leader: int) -> list[str]:
    """The command lines of a session's processes: those that a command started and left behind."""
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(pid) == leader and (process := psutil.Process(pid)).status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return found


def _live(case: Case, told: str) -> None:
    """The life of the process."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out = os.open("/dev/full" if case.stdout == "full" else f"{told}/out", os.O_WRONLY)
    err = os.open(f"{told}/err", os.O_WRONLY)
    if case.stdout == "pipe":
        reading, out = os.pipe()
        os.close(reading)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    if case.stdout == "closed":
        os.close(1)
    for name, value in case.env.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    os.chdir(case.folder)
    if case.folder_gone:
        here = tempfile.mkdtemp()
        os.chdir(here)
        Path(here).rmdir()
    if case.file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (case.file_bytes, case.file_bytes))
    if case.user is not None:
        os.setgroups([])
        os.setresgid(case.user, case.user, case.user)
        os.setresuid(case.user, case.user, case.user)
    if case.without:
        _forget(case.without)
    # As the interpreter makes them at its start.
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    stdout = None if case.stdout == "closed" else open(1, "w", encoding=case.encoding, closefd=False)  # noqa: SIM115
    sys.stdout = stdout  # type: ignore[assignment]  # None, as the interpreter leaves it where it is closed
    sys.stderr = open(2, "w", encoding=case.encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.argv = ["headrace", *case.args]
    from headrace.__main__ import main

    main()


def _forget(packages: tuple[str, ...]) -> None:
    """As on a machine that never had them."""

    class Missing:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name.split(".")[0] in packages:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Missing())  # type: ignore[arg-type]  # as the import system needs it
    for name in list(sys.modules):
        if name.split(".")[0] in (*packages, *OURS):
            del sys.modules[name]
