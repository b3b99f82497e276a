"""The end of a rewind: the change of the registry by which a trainer says that it has gone back, and what waits for it.

And whether a rollback or a rewind was asked for before, since an operator may ask again for what is done or pending already.

See `state.rewinds`.
"""

from __future__ import annotations

from msgspec.structs import replace

from state.changes import Change, clock
from state.errors import Refused, StaleEpoch
from state.registry import CHAMPION_KEY, KEPT_RANGES, KeyedRecord, RegistryState, VersionRange
from state.rewinds import REWINDS_KEY, SkippedRange

__all__ = ["asked_before", "is_put_back", "require_gone_back", "rewound"]


def require_gone_back(state: RegistryState, what: str) -> None:
    """Raise Refused while the trainer has been sent back and hasn't gone yet: scorers would follow the line that is to be left.

    Args:
        what: that somebody wants to do.
    """
    pending = state.rewinds.pending
    if pending is not None:
        raise Refused(
            f"{what}: expected a trainer that has gone back to version {pending.version}, as {pending.who} asked at "
            f"{clock(pending.at_ms)}, found none yet. Scorers would follow the weights that were rolled back. Start a "
            "trainer, or look at its log, then run it again."
        )


def is_put_back(state: RegistryState, version: int) -> bool:
    """Whether a rollback has made a version champion, and it is held since."""
    return state.champion.version == version and state.champion.how == "rollback" and state.champion.hold


def asked_before(state: RegistryState, target: int, skipped: tuple[SkippedRange, ...]) -> str | None:
    """The operation of a pending rewind to the same version that leaves out the same; None without one."""
    pending = state.rewinds.pending
    if pending is None or pending.version != target:
        return None
    known = {(each.topic_id, each.partition, each.first, each.to) for each in state.rewinds.skipped}
    same = all((each.topic_id, each.partition, each.first, each.to) in known for each in skipped)
    return pending.operation if same else None


def rewound(
    state: RegistryState, operation: str, *, epoch: int, chain: str, up_to: int | None, who: str, now_ms: int
) -> Change[bool]:
    """The trainer has gone back as an operation asked for: its new chain has begun.

    Args:
        up_to: newest version of the line that was left; None: the newest announced.

    Returns:
        The change, and whether the rewind was pending.

    Raises:
        StaleEpoch: another trainer has taken over.
        Refused: the registry doesn't know the operation.
    """
    if epoch != state.trainer.epoch:
        raise StaleEpoch(
            f"rewind: expected the trainer's epoch {state.trainer.epoch} (taken by {state.trainer.who}), found {epoch}. "
            "Another trainer has taken over; this one must stop."
        )
    rewind = state.rewinds.of(operation)
    if rewind is None:
        raise Refused(f"rewind: expected operation {operation} among those asked for, found it neither pending nor done.")
    if rewind.up_to is not None:
        return Change((), False)
    newest = state.newest if up_to is None else up_to
    after = state.rewinds.ending(operation, up_to=newest, who=who, at_ms=now_ms, chain=chain)
    records = [KeyedRecord(REWINDS_KEY, after)]
    champion = state.champion
    if newest > rewind.version and (champion.version or 0) <= rewind.version:
        # Versions that were announced between the operation and the trainer's way back.
        ranges = (*champion.rolled_back, VersionRange(rewind.version, newest))
        if not all(champion.was_rolled_back(version) for version in state.versions if ranges[-1].includes(version)):
            records.append(KeyedRecord(CHAMPION_KEY, replace(champion, rolled_back=ranges[-KEPT_RANGES:])))
    return Change(tuple(records), True)
