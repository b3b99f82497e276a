"""Starts workers by forking a process that has imported everything, which takes a tenth of the CPU of a usual start.

A forked worker has its own environment, session, leash and log, as if it had been executed. This module forks the join's
workers with faults (`tests.faults.worker`), and `tests.forked` any worker.
"""

from __future__ import annotations

import array
import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

__all__ = ["Child", "Nursery", "serve"]

MOST_BYTES = 1 << 16
ENDED = "the process that forks workers has ended; start again (runs that are done are not repeated)"


class Child:
    """A forked worker, with the methods of `subprocess.Popen` that `deploy.processes.workers.Worker` uses."""

    def __init__(self, pid: int, stdin: BinaryIO) -> None:
        self.pid, self.stdin = pid, stdin
        self.returncode: int | None = None
        self._ended = threading.Event()

    def ended(self, code: int) -> None:
        self.returncode = code
        with contextlib.suppress(OSError):
            self.stdin.close()
        self._ended.set()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired("worker", timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Nursery:
    """The process that forks workers, which starts with the first worker and ends with this process. Use it from any thread.

    Args:
        program: the module that forks. It imports what workers need, and calls `serve`.
    """

    def __init__(self, program: str = "tests.faults.nursery") -> None:
        self._program = program
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._children: dict[int, Child] = {}
        self._early_ends: dict[int, int] = {}  # exit codes, by pid, of children that ended before `start` knew them
        self._ended = False

    def start(self, arguments: Sequence[str], env: Mapping[str, str], cwd: Path, log: Path) -> Child:
        """Start a worker with these arguments; its stderr is appended to the log."""
        reading, writing = os.pipe()
        with self._lock:
            if self._socket is None:
                self._begin()
            assert self._socket is not None
            order = msgspec.json.encode([list(arguments), dict(env), str(cwd), str(log)])
            descriptors = array.array("i", [reading])
            try:
                self._socket.sendmsg([order], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
            except OSError as error:
                os.close(writing)
                raise RuntimeError(ENDED) from error
            finally:
                os.close(reading)
            self._born.wait()
            if self._ended:
                os.close(writing)
                raise RuntimeError(ENDED)
            self._born.clear()
            child = self._children[self._newest] = Child(self._newest, os.fdopen(writing, "wb"))
            if child.pid in self._early_ends:
                child.ended(self._early_ends.pop(child.pid))
            return child

    def close(self) -> None:
        """End the process that forks; its children continue."""
        if self._socket is not None:
            self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()
            self._process.wait()

    def _begin(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket, self._born, self._newest = ours, threading.Event(), 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", self._program, str(theirs.fileno())], pass_fds=[theirs.fileno()]
        )
        theirs.close()
        threading.Thread(target=self._listen, args=(ours,), daemon=True).start()

    def _listen(self, ours: socket.socket) -> None:
        while news := ours.recv(MOST_BYTES):
            pid, code = msgspec.json.decode(news)
            if code is None:
                self._newest = pid
                self._born.set()
            elif pid in self._children:
                self._children.pop(pid).ended(code)
            else:
                self._early_ends[pid] = code
        self._ended = True
        self._born.set()


def serve(orders: socket.socket, main: Callable[[], Any]) -> None:
    """Fork a child for each order, and report each child's start and end; returns when the socket is closed.

    Args:
        main: what a child does, with the arguments in `sys.argv`. It returns the exit code, or raises SystemExit.
    """

    def reap(number: int, frame: Any) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                with contextlib.suppress(OSError):
                    orders.send(msgspec.json.encode([pid, os.waitstatus_to_exitcode(status)]))

    signal.signal(signal.SIGCHLD, reap)
    while True:
        order, ancillary, _, _ = orders.recvmsg(MOST_BYTES, socket.CMSG_SPACE(4))
        if not order:
            return
        [(_, _, data)] = ancillary
        stdin = array.array("i", data)[0]
        arguments, env, cwd, log = msgspec.json.decode(order)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # so that the start is reported before the end
        pid = os.fork()
        if not pid:
            orders.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            _live(main, arguments, env, cwd, log, stdin)
        os.close(stdin)
        orders.send(msgspec.json.encode([pid, None]))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})


def _live(main: Callable[[], Any], arguments: list[str], env: dict[str, str], cwd: str, log: str, stdin: int) -> None:
    """Run a worker in the forked child; never returns."""
    code: Any = 1
    try:
        os.setsid()
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        os.dup2(stdin, 0)
        os.close(stdin)
        sys.stdin = os.fdopen(0)
        file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(file, 2)
        os.close(file)
        sys.argv = ["worker", *arguments]
        code = main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    import deploy.cli.run  # noqa: F401
    import stream.join.worker  # noqa: F401
    from tests.faults.worker import main

    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])), main)
