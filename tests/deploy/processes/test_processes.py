from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from deploy.processes import background
from deploy.processes.background import Process, mark, stop_all
from deploy.processes.usage import usage


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


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
def test_a_mark_counts_from_the_boot(sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Setting the clock changes no mark, and the state files of earlier versions hold the same text."""
    stat = Path(f"/proc/{sleeper.pid}/stat").read_text().rpartition(")")[2].split()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    process = mark(sleeper.pid)
    assert process is not None and process.started == f"{boot}:{stat[19]}"
    real = psutil.boot_time()
    for module in (psutil, psutil._pslinux):
        monkeypatch.setattr(module, "boot_time", lambda: real + 3_600.0)
    assert process.alive
    sleeper.kill()
    sleeper.wait()
    assert not process.alive and mark(sleeper.pid) is None


def test_a_clock_set_between_two_readings_ends_nothing(
    sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = mark(sleeper.pid)
    readings = iter([psutil.boot_time() + 1.0])
    monkeypatch.setattr(background.psutil, "boot_time", lambda: next(readings, psutil._pslinux.boot_time()))
    assert process is not None and process.alive


def test_usage_of_a_process() -> None:
    program = "import sys; held = bytearray(64 << 20); del held; sum(range(3_000_000)); print(flush=True); sys.stdin.read()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", program], stdin=pipe, stdout=pipe) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdout.readline()
        used = usage(child.pid)
        child.stdin.close()
    assert used.cpu_seconds > 0 and 0 < used.rss_mb < used.peak_rss_mb - 50, used
    with pytest.raises(psutil.NoSuchProcess):
        usage(child.pid)
