"""The code that a result belongs to: a hash over the files of the repository that a run loads, and their commit.

Results stay valid if other files change, such as pages.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

__all__ = ["ROOT", "SNAPSHOTS", "code_now", "commit_now", "deciding_files"]

ROOT = Path(__file__).parents[2]
# Runs only use the settings of `model`, and only `run` of `deploy/cli`. Other modules that are imported don't affect results.
DECIDING = (
    "requirements.lock",
    "state/*.py",
    "stream/*.py",
    "stream/formats/*.py",
    "stream/join/*.py",
    "stream/kafka/*.py",
    "stream/letters/*.py",
    "stream/records/*.py",
    "stream/registry/*.py",
    "stream/topics/*.py",
    "stream/worker/*.py",
    "model/growing.py",
    "model/reserve.py",
    "model/rows.py",
    "model/schema.py",
    "model/settings.py",
    "model/table_settings.py",
    "deploy/*.py",
    "deploy/cli/__init__.py",
    "deploy/cli/run.py",
    "deploy/demo/play.py",
    "deploy/feeding/*.py",
    "deploy/local_kafka/*.py",
    "deploy/processes/*.py",
    "tests/faults/*.py",
    "tests/faults/kinds/*.py",
)
SNAPSHOTS = (
    "requirements.lock",
    "state/*.py",
    "model/*.py",
    "stream/*.py",
    "stream/deltas/*.py",
    "stream/kafka/*.py",
    "stream/records/*.py",
    "stream/registry/*.py",
    "stream/scorer/*.py",
    "stream/topics/*.py",
    "stream/trainer/*.py",
    "deploy/local_kafka/*.py",
    "tests/stream/trainer/factory.py",
    "tests/judged.py",
    "tests/faults/snapshots/*.py",
    "tests/faults/snapshots/kinds/*.py",
)
"""The files of the runs of `tests.faults.snapshots`."""
TESTS = "tests/faults/**/test_*.py"


def deciding_files(patterns: Sequence[str] = DECIDING) -> list[str]:
    """The files that decide results, relative to the repository, sorted."""
    found = {path for pattern in patterns for path in ROOT.glob(pattern)} - set(ROOT.glob(TESTS))
    return sorted(str(path.relative_to(ROOT)) for path in found)


def code_now(patterns: Sequence[str] = DECIDING) -> str:
    """A hash over the names and contents of `deciding_files` as they are on the disk."""
    whole = blake2b(digest_size=8)
    for name in deciding_files(patterns):
        content = (ROOT / name).read_bytes()
        whole.update(f"{name} {len(content)}\n".encode() + content)
    return whole.hexdigest()


def commit_now(patterns: Sequence[str] = DECIDING) -> str:
    """The last commit that changed one of `deciding_files`, with " and changes" if the files on the disk differ from it."""
    paths = ["--", *(f":(glob){pattern}" for pattern in patterns), f":(exclude,glob){TESTS}"]
    commit = _git("log", "-1", "--format=%h", *paths)
    return f"{commit or 'none'}{' and changes' if _git('status', '--porcelain', *paths) else ''}"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
