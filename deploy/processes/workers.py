"""Worker processes for the demo, benchmarks and tests: `headrace run …` on a leash, so that none outlives its parent."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

from deploy.errors import DeployError
from deploy.processes.usage import usage

__all__ = ["Worker", "stop_workers"]

STOP_S = 12.0  # a worker drains within 9 s by itself
POLL_S = 0.05
# Longest wait until a worker is ready. A worker that has ended is noticed at once, so the limit is for one that hangs. Starting
# takes 5 to 10 s on a quiet machine with two cores; a minute was not enough on one with a load of 15.
READY_S = 180.0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Worker:
    """One `headrace run KIND`. The worker ends when this process ends, even by kill -9.

    Args:
        kind: join, trainer or scorer.
        env: the worker's whole environment, HEADRACE_* included.
        log: the file that the worker's stderr is appended to.
        nice: the worker's niceness, 0 to 19.
    """

    def __init__(self, kind: str, env: Mapping[str, str], log: Path, *, cwd: Path, nice: int = 0) -> None:
        self.kind, self.log, self.port, self._nice = kind, log, _free_port(), nice
        self._env, self._cwd = dict(env), cwd
        self.program = [sys.executable, "-m", "headrace"]
        self._process: subprocess.Popen[bytes] | None = None
        self._peak_rss_mb = 0.0

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return None if self._process is None else self._process.poll()

    def start(self) -> None:
        """Start the worker. A worker that has ended can be started again."""
        self.wait_stopped()  # closes the old leash
        command = [*self.program, "run", self.kind, "--leash", "--http-port", str(self.port)]
        command += ["--nice", str(self._nice)]
        with self.log.open("ab") as stderr:
            # In a session of its own, so that Ctrl-C reaches the parent alone, which stops its workers in order.
            self._process = subprocess.Popen(
                command, env=self._env, cwd=self._cwd, stdin=subprocess.PIPE, stderr=stderr, start_new_session=True
            )

    def check(self) -> None:
        """Raise DeployError, with the last lines of the log, when the worker has ended."""
        code = self.returncode
        if code is not None:
            raise DeployError(f"the {self.kind} worker ended with {code}. {self._log_tail()}")

    def _log_tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-12:]
        return f"{self.log} says:\n  " + "\n  ".join(lines)

    def is_ready(self) -> bool:
        with contextlib.suppress(OSError), self._get("/readyz"):
            return True
        return False

    def wait_ready(self, timeout_s: float = READY_S) -> None:
        """Wait for `/readyz`.

        Raises:
            DeployError: the worker ended, or isn't ready in time. The message has the last lines of its log.
        """
        deadline = time.monotonic() + timeout_s
        while not self.is_ready():
            self.check()
            if time.monotonic() > deadline:
                raise DeployError(
                    f"the {self.kind} worker: expected to be ready within {timeout_s:.0f} s, found that it isn't. "
                    f"The machine has a load of {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; try again when it is "
                    f"quieter. {self._log_tail()}"
                )
            time.sleep(POLL_S)

    def metrics(self) -> dict[tuple[str, tuple[str, ...]], float]:
        """The worker's metrics now, by (sample name, label values); empty while it doesn't answer."""
        try:
            with self._get("/metrics") as answer:
                text = answer.read().decode()
        except (OSError, urllib.error.URLError):
            return {}
        return {
            (sample.name, tuple(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def peak_rss_mb(self) -> float:
        """The most memory that the worker has held, in MiB; after its end, the last value that was read."""
        with contextlib.suppress(psutil.Error):
            self._peak_rss_mb = usage(self.pid).peak_rss_mb or self._peak_rss_mb  # 0 when the worker has ended
        return round(self._peak_rss_mb, 1)

    def kill(self) -> None:
        """SIGKILL: what a crash looks like."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def ask_to_stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def wait_stopped(self, timeout_s: float = STOP_S) -> None:
        if self._process is None:
            return
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _get(self, path: str) -> IO[Any]:
        answer: IO[Any] = urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=2)
        return answer


def stop_workers(workers: list[Worker]) -> None:
    """SIGTERM to all, wait, SIGKILL to what is left."""
    for worker in workers:
        worker.ask_to_stop()
    for worker in workers:
        worker.wait_stopped()
