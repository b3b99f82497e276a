"""Tests as another user: root's rights know no obstacle, so what a mode forbids is tried as `nobody`.

Such a test needs a checkout that the other user can read. Below a folder of mode 700, as root's home is, it skips.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

__all__ = ["NOBODY", "as_nobody", "needs_a_readable_checkout"]

NOBODY = 65_534
ROOT = Path(__file__).resolve().parents[1]
LOOK = """
import os, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.exit(not all(os.access(path, os.R_OK) for path in sys.argv[1:]))
"""


@cache
def _is_readable() -> bool:
    """Whether `nobody` can read the code and the packages."""
    if os.geteuid() != 0:
        return True
    paths = [str(ROOT / "deploy" / "__init__.py"), str(Path(pytest.__file__).resolve())]
    return subprocess.run([sys.executable, "-I", "-S", "-c", LOOK, *paths], check=False).returncode == 0


def needs_a_readable_checkout() -> None:
    """Skip the test that calls this where `nobody` can't read the checkout."""
    if not _is_readable():
        pytest.skip(f"user {NOBODY} can't read {ROOT} or its packages: a folder above them is private")


@contextmanager
def as_nobody() -> Iterator[None]:
    """Run as `nobody` where the tests run as root, so that modes hold; else as the user who runs them."""
    if os.geteuid() != 0:
        yield
        return
    needs_a_readable_checkout()
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
