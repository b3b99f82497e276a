from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from deploy.processes import background as processes
from deploy.processes.background import Process, mark, stop_all


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as child:
        yield child
        child.kill()


def test_alive_until_it_ends(sleeper: subprocess.Popen[bytes]) -> None:
    process = mark(sleeper.pid)
    assert process is not None
    assert process.alive
    assert mark(sleeper.pid) == process
    assert stop_all([process], timeout_ms=5_000) == []
    assert not process.alive, "ended but not waited for counts as ended"
    assert sleeper.wait() == -signal.SIGTERM
    assert mark(sleeper.pid) is None


def test_a_stranger_with_the_same_pid_is_left_alone(sleeper: subprocess.Popen[bytes]) -> None:
    process = mark(sleeper.pid)
    assert process is not None
    earlier = Process(pid=sleeper.pid, started=process.started + "0")
    assert not earlier.alive
    assert not earlier.send(signal.SIGKILL)
    assert stop_all([earlier], timeout_ms=1_000) == []
    assert sleeper.poll() is None


def test_deaf_and_paused_processes_are_ended() -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as deaf:
        assert deaf.stdout is not None
        deaf.stdout.readline()
        with subprocess.Popen(["sleep", "60"]) as paused:
            os.kill(paused.pid, signal.SIGSTOP)
            marks = [process for child in (deaf, paused) if (process := mark(child.pid))]
            started = time.monotonic()
            assert stop_all(marks, timeout_ms=500) == [deaf.pid]
            assert time.monotonic() - started < 5
            assert deaf.wait() == -signal.SIGKILL
            assert paused.wait() == -signal.SIGTERM


def test_ps_tells_the_same_of_a_process(sleeper: subprocess.Popen[bytes]) -> None:
    first = processes._started_by_ps(sleeper.pid)
    assert first
    assert processes._started_by_ps(sleeper.pid) == first
    sleeper.kill()
    sleeper.wait()
    assert processes._started_by_ps(sleeper.pid) is None
