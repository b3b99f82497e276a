"""Checks a version before anybody is sent to it, and a plan before it is carried out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

from state.background import within
from state.errors import SnapshotCorrupt, SnapshotError
from state.store import SnapshotStore
from stream.errors import RegistryError
from stream.records.times import duration
from stream.registry.requests import Checked, Plan, RollbackRequest

__all__ = ["Check", "check_store", "checked_meanwhile", "require_right_clock"]

log = logging.getLogger(__name__)

# The hashes of a version whose serving files are larger aren't checked before a rollback: 0.3 s of reading and hashing, so that
# a rollback stays below a second. Scorers check them when they load the version, and never serve a damaged one.
CHECK_BYTES = 150_000_000
# Longest wait for the store before a rollback goes on without a check.
CHECK_S = 2.0

# Difference of the clock that a plan was made by from Kafka's beyond which the plan may name another version. Clocks that are
# kept by NTP differ by less.
CLOCK_MS = 2_000

Check = Callable[[int], Awaitable[Checked]]
"""Waits for the check of a version. Raises SnapshotError if the version isn't whole."""


async def check_store(store: SnapshotStore | None, version: int, *, hashes: bool = False) -> Checked:
    """Raise SnapshotError if the version isn't whole in the store, so that scorers are never sent to it.

    A rollback is urgent, and scorers have its usual target in memory: a store that doesn't answer in time is passed over.

    Args:
        hashes: it is urgent. Also read and hash the files that scorers read, where there is time.
    """
    if store is None:
        return "nothing"
    try:
        found = await within(CHECK_S if hashes else None, lambda: _check(store, version, hashes=hashes))
        if found.problems:
            raise SnapshotCorrupt(found.problems[0])
    except SnapshotError as error:
        raise type(error)(f"{error} Nothing was changed; --unchecked goes there all the same.") from error
    except TimeoutError:
        log.warning("version %d: %s did not answer within %g s, so its files are not checked", version, store.url, CHECK_S)
        return "nothing"
    return "hashes" if found.hashed else "sizes"


@asynccontextmanager
async def checked_meanwhile(store: SnapshotStore | None, known: int | None) -> AsyncIterator[Check]:
    """Begin to check a version that is known already, by hashes too. The result waits for the check of a version.

    A version other than `known` is checked when the result is called.
    """
    early = None if known is None else asyncio.ensure_future(check_store(store, known, hashes=True))

    async def check(version: int) -> Checked:
        return await (check_store(store, version, hashes=True) if early is None or version != known else early)

    try:
        yield check
    finally:
        if early is not None:
            early.cancel()
            await asyncio.gather(early, return_exceptions=True)


def require_right_clock(plan: Plan, now_ms: int) -> None:
    """Raise RegistryError if a plan that goes by time was made by a clock that isn't Kafka's.

    Only a heartbeat or a write shows Kafka's time, and a plan writes nothing.
    """
    request = plan.request
    if plan.made is None or not isinstance(request, RollbackRequest) or not request.goes_by_time:
        return
    off_ms = round(plan.made.kafka_ms + (time.monotonic() - plan.made.monotonic_s) * 1_000) - now_ms
    if abs(off_ms) > CLOCK_MS:
        how = "ahead of" if off_ms > 0 else "behind"
        raise RegistryError(
            f"rollback to version {plan.version}: expected a plan made by Kafka's clock, found one made by this machine's, "
            f"which is {duration(abs(off_ms))} {how} it. Nothing was changed. Set this machine's clock, or run the command "
            "with --yes, which goes by Kafka's."
        )


class _Found(NamedTuple):
    problems: list[str]
    hashed: bool


def _check(store: SnapshotStore, version: int, *, hashes: bool) -> _Found:
    """All in one thread: where scorers and a broker keep every core busy, each change of threads waits for a core."""
    problems = store.verify(version, hashes=False)
    if problems or not hashes or store.manifest(version).serving_size > CHECK_BYTES:
        return _Found(problems, hashed=False)
    return _Found(store.verify(version, serving_only=True), hashed=True)
