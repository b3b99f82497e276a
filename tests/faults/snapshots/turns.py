"""A process that plays one run after another, taking turns with others like it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from tests.faults.snapshots.kinds import kind_named
from tests.faults.snapshots.play import play, where_of

__all__ = ["work"]


def work(tasks: Any, answers: Any, servers: str, broker: Path, folder: Path, code: str) -> None:
    """Play runs until there are no more. Expected errors of the product are in results, not in the terminal.

    Args:
        tasks: a queue of kinds' names and seeds; None ends it.
        answers: a queue for the results, encoded.
    """
    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    while (turn := tasks.get()) is not None:
        name, seed = turn
        answers.put(msgspec.json.encode(play(kind_named(name), where_of(servers, broker, seed, folder), code=code)))
