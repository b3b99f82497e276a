"""Checks a version before anybody is sent to it."""

from __future__ import annotations

import logging

from state.background import within
from state.errors import SnapshotCorrupt, SnapshotError
from state.store import SnapshotStore
from stream.registry.requests import Checked

__all__ = ["check_store"]

log = logging.getLogger(__name__)

# The hashes of a version whose serving files are larger aren't checked before a rollback: 0.3 s of reading and hashing, so that
# a rollback stays below a second. Scorers check them when they load the version, and never serve a damaged one.
CHECK_BYTES = 150_000_000
# Longest wait for each answer of the store before a rollback goes on without it.
CHECK_S = 2.0


async def check_store(store: SnapshotStore | None, version: int, *, hashes: bool = False) -> Checked:
    """Raise SnapshotError if the version isn't whole in the store, so that scorers are never sent to it.

    A rollback is urgent, and scorers have its usual target in memory: a store that doesn't answer in time is passed over.

    Args:
        hashes: it is urgent. Also read and hash the files that scorers read, where there is time.
    """
    if store is None:
        return "nothing"
    try:
        problems = await within(CHECK_S if hashes else None, lambda: store.verify(version, hashes=False))
        if not problems and hashes and (await within(CHECK_S, lambda: store.manifest(version))).serving_size <= CHECK_BYTES:
            problems = await within(CHECK_S, lambda: store.verify(version, serving_only=True))
        else:
            hashes = False
        if problems:
            raise SnapshotCorrupt(problems[0])
    except SnapshotError as error:
        raise type(error)(f"{error} Nothing was changed; --unchecked goes there all the same.") from error
    except TimeoutError:
        log.warning("version %d: %s did not answer within %g s, so its files are not checked", version, store.url, CHECK_S)
        return "nothing"
    return "hashes" if hashes else "sizes"
