"""How many files a worker may open, and how many of them the state of each partition takes."""

from __future__ import annotations

import resource

from state.errors import JoinStateError

__all__ = ["check_file_limit", "open_files_each", "raise_file_limit"]

# Libraries, logs, the group's connections, and those of up to 8 takeovers at once.
BASE = 200
# Besides tables: RocksDB's lock, logs and manifest (6), and connections of the partition's producer (a few brokers).
BESIDES = 16
# Tables that one partition keeps open. Fewer are opened again and again (32 hold some 2 GiB of tables); RocksDB asks for 20.
LEAST, MOST = 32, 256


def raise_file_limit() -> int:
    """Raise this process' limit of open files as far as it may, and return what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else 1 << 30


def open_files_each(limit: int, partitions: int) -> int:
    """Tables that each partition may keep open where one worker has them all."""
    return min(max((limit - BASE) // partitions - BESIDES, LEAST), MOST)


def check_file_limit(limit: int, partitions: int) -> None:
    """Before so many partitions are opened.

    Raises:
        JoinStateError: the limit is too low for them.
    """
    needed = BASE + partitions * (BESIDES + LEAST)
    if limit < needed:
        raise JoinStateError(
            f"open files: expected a limit of at least {needed} for {partitions} partitions, found {limit} (the hard limit). "
            "Raise it: `ulimit -Hn` in a shell, LimitNOFILE= of a systemd unit, `ulimits: nofile` of compose. Or run more join "
            "workers, so that each has fewer partitions."
        )
