"""Starts `headrace run …` by forking a process that has imported everything, instead of executing Python again.

A start of a worker costs 5 to 8 s of CPU, nearly all of it for the imports of torch and Faust, and the tests start a hundred
workers. The rest is as in a real start: environment, folder, session, leash, signals, log and exit code. Tests of the start
itself, and the demo's, execute the worker.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.processes.workers import Worker
from tests.faults.nursery import Child, Nursery, serve

__all__ = ["ForkedWorker", "forked", "forked_python"]

_NURSERY = Nursery("tests.forked")
_CHANGE = "CHANGE_FOR_A_TEST"


def forked(arguments: Sequence[str], env: Mapping[str, str], cwd: Path, log: Path) -> Child:
    """Run `headrace` with these arguments in a process of its own. Its stderr is appended to the log."""
    log.touch()
    return _NURSERY.start(arguments, env, cwd, log)


def forked_python(code: str, env: Mapping[str, str], cwd: Path, log: Path) -> Child:
    """Run Python code in a process of its own. Its stderr is appended to the log."""
    return forked([], {**env, _CHANGE: f"import sys\n{code}\nsys.exit()"}, cwd, log)


class ForkedWorker(Worker):
    """A worker whose process is forked.

    Args:
        change: Python code that the worker runs before anything else.
    """

    def __init__(self, kind: str, env: Mapping[str, str], log: Path, *, cwd: Path, nice: int = 0, change: str = "") -> None:
        super().__init__(kind, {**env, _CHANGE: change}, log, cwd=cwd, nice=nice)

    def start(self) -> None:
        self.wait_stopped()
        arguments = ["run", self.kind, "--leash", "--http-port", str(self.port), "--nice", str(self._nice)]
        self._process = forked(arguments, self._env, self._cwd, self.log)  # type: ignore[assignment]


if __name__ == "__main__":
    import tests.deploy.cli.sweep_imports  # noqa: F401
    from headrace.__main__ import main

    def changed_main() -> None:
        exec(os.environ.pop(_CHANGE, ""), {})
        main()

    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[1])), changed_main)
