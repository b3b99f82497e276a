"""The parent's side of a join worker with a fault built in (`tests.faults.worker` is the worker itself)."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from deploy.demo.play import worker_environment
from deploy.processes.workers import Worker
from deploy.settings import Settings
from tests.faults.nursery import Nursery
from tests.faults.worker import Fault

__all__ = ["END_S", "FaultWorker"]

END_S = 60.0  # a worker drains within 9 s by itself, but for writes that a slow disk holds up
NURSERY = Nursery()


class FaultWorker(Worker):
    """A join worker with a fault built in until it is started again."""

    def __init__(self, env: dict[str, str], log: Path, *, cwd: Path, before: Sequence[str] = ()) -> None:
        super().__init__("join", env, log, cwd=cwd)
        self.program = [*before, sys.executable, "-m", "tests.faults.worker"]
        # A worker that strace or the loader has to take part in is executed; all others are forked.
        self._forked = not before and "LD_PRELOAD" not in env
        self.wanted = False
        self.ended: list[int] = []  # exit codes of the times that it ended without being asked to

    def arm(self, fault: Fault) -> None:
        self._env["FAULT"] = msgspec.json.encode(fault).decode()

    def settings(self, settings: Settings) -> None:
        """Use other settings from the next start on."""
        self._env = worker_environment(settings) | {"FAULT": self._env.get("FAULT", "{}")}

    def start(self) -> None:
        if self._forked:
            self.wait_stopped()
            arguments = ["run", self.kind, "--leash", "--http-port", str(self.port)]
            self._process = NURSERY.start(arguments, self._env, self._cwd, self.log)  # type: ignore[assignment]
        else:
            super().start()
        self.wanted = True

    def end(self, number: int = signal.SIGKILL) -> None:
        """End the worker and keep it ended. Blocks."""
        self.wanted = False
        assert self._process is not None
        self._process.send_signal(number)
        code = self._process.wait(END_S)
        if code not in (0, -number):
            self.ended.append(code)
