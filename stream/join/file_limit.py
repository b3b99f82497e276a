"""The number of files that a worker may open, and how many of them each partition's state may open."""

from __future__ import annotations

import resource

from state.errors import JoinStateError

__all__ = ["check_file_limit", "open_files_each", "raise_file_limit"]

# Files besides the partitions': libraries, logs, the group's connections, and those of up to 8 takeovers at once.
BASE = 200
# Files of a partition besides tables: RocksDB's lock, logs and manifest (6), and connections of its producer (a few brokers).
BESIDES = 16
# Tables that one partition keeps open. With fewer, RocksDB opens the same tables again and again (32 tables hold some 2 GiB,
# and it asks for at least 20).
LEAST, MOST = 32, 256


def raise_file_limit() -> int:
    """Raise this process' limit of open files to the hard limit, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else 1 << 30


def open_files_each(limit: int, partitions: int) -> int:
    """Number of tables that each partition may keep open if one worker has all partitions."""
    return min(max((limit - BASE) // partitions - BESIDES, LEAST), MOST)


def check_file_limit(limit: int, partitions: int) -> None:
    """Check the limit before a worker opens its partitions.

    Raises:
        JoinStateError: the limit is too low for so many partitions.
    """
    needed = BASE + partitions * (BESIDES + LEAST)
    if limit < needed:
        raise JoinStateError(
            f"open files: expected a limit of at least {needed} for {partitions} partitions, found {limit} (the hard limit). "
            "Raise it: `ulimit -Hn` in a shell, LimitNOFILE= of a systemd unit, `ulimits: nofile` of compose. Or run more join "
            "workers, so that each has fewer partitions."
        )
