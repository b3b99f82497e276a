"""Giving way, in processes of their own: what they change of their session's autogroup stays when they are gone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
AUTOGROUP = Path("/proc/self/autogroup")

WORKER = """
import os, pathlib
from deploy.processes.priority import give_way
give_way(7)
print(os.nice(0), end=" ")
"""
# As a shell does: it leads the session, and starts the worker in it.
SHELL = f"""
import os, pathlib, subprocess, sys
print(subprocess.run([sys.executable, "-c", {WORKER!r}], capture_output=True, check=True, text=True).stdout, end="")
print(os.nice(0), end=" ")
"""
TELL_GROUP = "print(pathlib.Path('/proc/self/autogroup').read_text().split()[-1])"


def in_a_new_session(program: str) -> list[int]:
    """What a Python program prints: numbers."""
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        start_new_session=True,
        capture_output=True,
        check=True,
        text=True,
        timeout=60,
    )
    return [int(number) for number in ran.stdout.split()]


OWN = os.nice(0)  # of the tests, which may run under `nice`


@pytest.mark.skipif(OWN > 12, reason=f"niceness {OWN} leaves no room for 7 more")
def test_a_process_is_nice() -> None:
    assert in_a_new_session(WORKER) == [OWN + 7]
    assert in_a_new_session(SHELL) == [OWN + 7, OWN]


@pytest.mark.skipif(OWN > 12, reason=f"niceness {OWN} leaves no room for 7 more")
@pytest.mark.skipif(not AUTOGROUP.exists(), reason="this kernel has no autogroups (CONFIG_SCHED_AUTOGROUP)")
def test_a_session_is_nice_only_when_it_is_the_workers_own() -> None:
    assert in_a_new_session(WORKER + TELL_GROUP) == [OWN + 7, 7]
    assert in_a_new_session(SHELL + TELL_GROUP) == [OWN + 7, OWN, 0]
