"""Changes of the registry of versions. Each function looks at the state and returns the records to write.

The functions are pure, so that a retry can decide again on a newer state. They don't change the state: the records do, once
they are in the log and are applied.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from msgspec.structs import replace

from state.canary_running import stopped_by_rollback
from state.changes import Announcement, Cause, Change, Held, Moved, Undo, clock
from state.errors import Refused, StaleEpoch
from state.gate_report import judge_version
from state.manifest import Manifest
from state.registry import (
    CHAMPION_KEY,
    KEPT_BY_HAND,
    KEPT_MOVES,
    KEPT_RANGES,
    KEPT_TIMES,
    TRAINER_KEY,
    Champion,
    How,
    KeyedRecord,
    Move,
    RegistryState,
    TrainerLease,
    VersionRange,
    VersionRecord,
    version_key,
)
from state.rewind_decisions import asked_before, is_put_back, require_gone_back
from state.rewinds import REWINDS_KEY, Rewind, SkippedRange
from state.settings import SnapshotSettings

__all__ = [
    "announce",
    "announced",
    "due_good",
    "hold",
    "install",
    "promote",
    "resume",
    "rollback",
    "rollback_target",
    "tag_good",
    "take_epoch",
]


def take_epoch(state: RegistryState, *, who: str, now_ms: int, above: int = 0) -> Change[int]:
    """A trainer starts: it takes the next epoch, and one above `above`. Trainers of older epochs can no longer announce."""
    lease = TrainerLease(epoch=max(state.trainer.epoch, above) + 1, who=who, at_ms=now_ms)
    return Change((KeyedRecord(TRAINER_KEY, lease),), lease.epoch)


def announce(
    state: RegistryState, manifest: Manifest, *, settings: SnapshotSettings, who: str, now_ms: int, operation: str
) -> Change[Announcement]:
    """Enter a version. Promote it when the gate lets it through, auto-promotion is on and isn't held.

    Raises:
        StaleEpoch: another trainer has taken over.
        Refused: the version isn't above the newest announced, or the epoch was never taken.
    """
    version = manifest.version
    if manifest.epoch < state.trainer.epoch:
        raise StaleEpoch(
            f"version {version}: expected the trainer's epoch {state.trainer.epoch} (taken by {state.trainer.who}), found "
            f"{manifest.epoch}. Another trainer has taken over; this one must stop."
        )
    if manifest.epoch > state.trainer.epoch:
        raise Refused(
            f"version {version}: expected the trainer's epoch {state.trainer.epoch}, found {manifest.epoch}, which nobody "
            "took. Take an epoch before announcing; if the topic was made anew, restart the trainer."
        )
    known = state.versions.get(version)
    if known is not None and (known.epoch, known.created_at_ms) == (manifest.epoch, manifest.created_at_ms):
        return Change((), Announcement(version, bool(known.champion_at_ms), known.gate))  # a retry of an entry that succeeded
    if version <= state.newest:
        raise Refused(
            f"version {version}: expected a number above {state.newest}, the newest announced, found {version}. "
            "Take the larger of the store's and the registry's next number."
        )
    verdict = judge_version(
        manifest.verdict, manifest.metrics, manifest.examples_seen, champion_line=state.champion_line, settings=settings
    )
    held = state.champion.hold
    if verdict.passed and (held or not settings.auto_promote):
        why = f"held ({state.champion.hold_reason})" if held else "snapshots.auto_promote is off"
        promoted, reason = False, f"candidate: {why}; passed the gate: {verdict.reason}"
    else:
        promoted = verdict.passed
        reason = f"{'promoted' if promoted else 'candidate'}: {verdict.reason}"
    entry = VersionRecord.of(manifest, now_ms=now_ms, who=who, gate=reason)
    outcome = Announcement(version, promoted, reason, state.champion.version if promoted else None)
    if not promoted:
        return Change((KeyedRecord(version_key(version), entry),), outcome)
    return Change(_move(state.champion, entry, Cause(who, now_ms, reason, operation), how="auto").records, outcome)


def promote(
    state: RegistryState, version: int, cause: Cause, *, hold: bool | None = None, hold_reason: str = ""
) -> Change[Moved]:
    """Make a version champion by hand. `hold` also holds auto-promotion (True) or lets it go on (False).

    Raises:
        Refused: the version was never announced, nothing would change, or auto-promotion would go on before the trainer has
            gone back as it was asked to. An operator may follow the line that is to be left, by one of its versions.
    """
    before = state.champion
    entry = announced(state, version)
    held = _held(before, hold, hold_reason, cause)
    if before.hold and not held.hold and not state.rewinds.left(version):
        require_gone_back(state, f"promote {version} and resume")
    if version == before.version:
        if held == before:
            raise Refused(f"version {version}: it is champion already, since {clock(before.at_ms)}. Nothing was changed.")
        return Change((KeyedRecord(CHAMPION_KEY, held),), Moved(version, version, held.hold, _undo(before, held)))
    # An operator who promotes a version vouches for it: neither that version nor those below it count as rolled back any more.
    ranges = tuple(
        each._replace(above=version) if each.includes(version) else each for each in before.rolled_back if version != each.up_to
    )
    step = _move(replace(held, rolled_back=ranges), entry, cause, how="promote")
    return Change(step.records, Moved(version, before.version, step.champion.hold, _undo(before, step.champion)))


def rollback(
    state: RegistryState, target: int, cause: Cause, *, rewind: bool = False, skipped: Iterable[SkippedRange] = ()
) -> Change[Moved]:
    """Put an older version back, hold auto-promotion, and end a shadow or canary. An earlier hold stays, with its own reason.

    Args:
        target: from `rollback_target`.
        rewind: the trainer goes back to the target too (`state.rewinds`). The target may then be the champion.
        skipped: stretches of `examples` that the trainer leaves out from then on.

    Raises:
        Refused: the target was never announced or isn't older than the champion.
    """
    before = state.champion
    entry = announced(state, target)
    asked = asked_before(state, target, skipped := tuple(skipped)) if rewind else None  # then it changes nothing again
    if is_put_back(state, target) and (asked is not None or not rewind):
        return Change(stopped_by_rollback(state, cause), Moved(target, before.previous, True, None, asked, alone=True))
    if before.version is None or target > before.version or (target == before.version and not rewind):
        raise Refused(
            f"rollback to version {target}: expected one older than the champion, {before.version}. To go forward: "
            f"`headrace snapshot promote {target} --reason …`."
        )
    held = before if before.hold else _held(before, True, f"rolled back: {cause.reason}", cause)
    left = max(state.newest, before.version) if rewind else before.version
    ranges = before.rolled_back if left == target else (*before.rolled_back, VersionRange(target, left))[-KEPT_RANGES:]
    after = replace(held, rolled_back=ranges)
    if target == before.version:
        records: tuple[KeyedRecord, ...] = (KeyedRecord(CHAMPION_KEY, after),) if after != before else ()
    else:
        step = _move(after, entry, cause, how="rollback")
        records, after = step.records, step.champion
    if rewind:
        back = Rewind(version=target, who=cause.who, at_ms=cause.now_ms, reason=cause.reason, operation=cause.operation)
        records += (KeyedRecord(REWINDS_KEY, state.rewinds.adding(back, skipped)),)
    records += stopped_by_rollback(state, cause)
    operation = cause.operation if rewind else None
    return Change(records, Moved(target, before.version, True, _undo(before, after), operation, alone=True))


def rollback_target(
    state: RegistryState,
    *,
    to: int | None = None,
    back_ms: int | None = None,
    before_ms: int | None = None,
    now_ms: int,
    or_champion: bool = False,
) -> int:
    """The version that a rollback goes to. Without `to`, `back_ms` and `before_ms`: the newest older one tagged good.

    Args:
        to: this version.
        back_ms: the champion this long before `now_ms`.
        before_ms: the champion at this time (ms since epoch).
        or_champion: the champion may be named too: the trainer goes back to it. One that was put back always may.

    Raises:
        Refused: there is no such version, or it isn't older than the champion. The message lists what can be named.
    """
    champion = state.champion.version
    if champion is None:
        raise Refused("rollback: expected a champion to go back from, found none. Nothing is served yet.")
    if sum(choice is not None for choice in (to, back_ms, before_ms)) > 1:
        raise Refused("rollback: expected one of --to, --back and --before, found several. Name one.")
    if to is not None:
        target: int | None = announced(state, to).version
    elif back_ms is not None or before_ms is not None:
        at_ms = now_ms - back_ms if back_ms is not None else before_ms
        assert at_ms is not None
        target = state.champion_at(at_ms)
        if target is None:
            raise Refused(
                f"rollback: expected a champion at {clock(at_ms)}, found none remembered. {_choices(state, champion)}"
            )
    else:
        good = [
            version
            for version, record in state.versions.items()
            if version < champion and record.good_at_ms is not None and not state.champion.was_rolled_back(version)
        ]
        withheld = state.withheld
        if withheld is not None and withheld.anchor is not None:
            # The fault began some clicks before the gate withheld: versions since the anchor may have been tagged too early.
            good = [version for version in good if version <= withheld.anchor] or good
        target = max(good, default=None)
        if target is None:
            raise Refused(
                f"rollback from version {champion}: expected an older version tagged good, found none. "
                f"{_choices(state, champion)}"
            )
    or_champion = or_champion or (to is not None and is_put_back(state, to))
    if target is None or target > champion or (target == champion and not or_champion):
        raise Refused(
            f"rollback to version {target}: expected one older than the champion, {champion}. {_choices(state, champion)}"
        )
    return target


def hold(state: RegistryState, cause: Cause) -> Change[Held]:
    """Hold auto-promotion until `resume`. An earlier hold stays, with its own reason."""
    before = state.champion
    undo = Undo(None, "", hold=False)
    if before.hold:
        # An attempt that seemed to fail may have taken effect: then the hold in the log is this operation's own.
        ours = _is_by(before, cause)
        reason, who, at_ms = before.hold_reason, before.hold_who, before.hold_at_ms
        return Change((), Held(True, reason, ours, undo if ours else None, who, at_ms))
    after = _held(before, True, cause.reason, cause)
    return Change((KeyedRecord(CHAMPION_KEY, after),), Held(True, cause.reason, True, undo, cause.who, cause.now_ms))


def resume(state: RegistryState, cause: Cause) -> Change[Held]:
    """Let auto-promotion go on with the next version that passes the gate.

    Raises:
        Refused: a trainer has been sent back and hasn't gone yet. Scorers would follow the line that is to be left.
    """
    before = state.champion
    if before.hold:
        require_gone_back(state, "resume")
    if not before.hold:
        return Change((), Held(False, "", _is_by(before, cause), None, before.hold_who, before.hold_at_ms))
    after = _held(before, False, "", cause)
    undo = Undo(None, "", hold=True, hold_reason=before.hold_reason)
    return Change((KeyedRecord(CHAMPION_KEY, after),), Held(False, cause.reason, True, undo, cause.who, cause.now_ms))


def tag_good(state: RegistryState, versions: Iterable[int], *, now_ms: int) -> Change[tuple[int, ...]]:
    """Tag versions as good. Versions that are tagged already, or no longer announced, are left out.

    Returns:
        The change, with the versions newly tagged.
    """
    fresh = [
        record
        for version in sorted(set(versions))
        if (record := state.versions.get(version)) is not None and record.good_at_ms is None
    ]
    records = tuple(KeyedRecord(version_key(record.version), replace(record, good_at_ms=now_ms)) for record in fresh)
    return Change(records, tuple(record.version for record in fresh))


def due_good(state: RegistryState, now_ms: int, settings: SnapshotSettings) -> list[int]:
    """Versions that are due to be tagged good.

    A version is due `good_after_ms` after it became champion, when nobody has rolled back over it and the gate is flowing. It
    need not be champion any more: with a version every few seconds, none stays champion that long.
    """
    if state.withheld is not None:
        return []
    return [
        version
        for version, record in sorted(state.versions.items())
        if record.good_at_ms is None
        and record.champion_at_ms
        and record.champion_at_ms[-1] <= now_ms - settings.good_after_ms
        and not state.champion.was_rolled_back(version)
        and record.verdict is not None
        and record.verdict.flow == "flowing"
        and not record.verdict.problems
    ]


def announced(state: RegistryState, version: int) -> VersionRecord:
    """The record of a version.

    Raises:
        Refused: the version was never announced, or is deleted.
    """
    record = state.versions.get(version)
    if record is None:
        there = f"{min(state.versions)} to {max(state.versions)}" if state.versions else "none"
        found = "none of that number"
        if any(version == doomed.version for doomed in state.deletion.versions):
            found = "one that is being deleted"
        raise Refused(
            f"version {version}: expected an announced version, found {found} (announced: {there}). "
            "`headrace snapshot list` shows them."
        )
    return record


def install(
    state: RegistryState, entry: VersionRecord, cause: Cause, *, rolled_back: tuple[VersionRange, ...] = ()
) -> tuple[KeyedRecord, ...]:
    """Records that make a version champion and hold auto-promotion, for a registry that has lost its champion."""
    ranges = tuple(each._replace(above=entry.version) if each.includes(entry.version) else each for each in rolled_back)
    held = replace(_held(state.champion, True, cause.reason, cause), rolled_back=ranges[-KEPT_RANGES:])
    return _move(held, entry, cause, how="promote").records


def _undo(before: Champion, after: Champion) -> Undo | None:
    """What brings `before` back: its version, and whether and why auto-promotion was held. None without a champion before."""
    if before.version is None:
        return None
    same_hold = (before.hold, before.hold_reason) == (after.hold, after.hold_reason)
    return Undo(before.version, f"undo of {after.version}", None if same_hold else before.hold, before.hold_reason)


class _Step(NamedTuple):
    """A move of the champion: the records to write, and the champion after it."""

    records: tuple[KeyedRecord, ...]
    champion: Champion


def _move(champion: Champion, entry: VersionRecord, cause: Cause, *, how: How) -> _Step:
    """A move to `entry`.

    `champion` is the champion before the move, but with the hold and the ranges that it is to have after the move.
    """
    # Clocks of different machines differ, and `--before` reads these times: a move is never earlier than the one before it.
    at_ms = max(cause.now_ms, champion.at_ms + 1)
    move = Move(
        version=entry.version,
        previous=champion.version,
        who=cause.who,
        at_ms=at_ms,
        reason=cause.reason,
        how=how,
        operation=cause.operation,
    )
    alias = replace(
        champion,
        version=move.version,
        previous=move.previous,
        who=move.who,
        at_ms=at_ms,
        reason=move.reason,
        how=how,
        moves=_kept((*champion.moves, move)),
    )
    entry = replace(entry, champion_at_ms=(*entry.champion_at_ms, at_ms)[-KEPT_TIMES:])
    # The version's record first, so that the alias never names a version that isn't there.
    return _Step((KeyedRecord(version_key(entry.version), entry), KeyedRecord(CHAMPION_KEY, alias)), alias)


def _kept(moves: tuple[Move, ...]) -> tuple[Move, ...]:
    """The last moves, and before them the last ones by hand: with a version a minute, those would be gone within the hour."""
    old, new = moves[:-KEPT_MOVES], moves[-KEPT_MOVES:]
    return (*[move for move in old if move.how != "auto"][-KEPT_BY_HAND:], *new)


def _held(champion: Champion, hold: bool | None, reason: str, cause: Cause) -> Champion:
    reason = reason if hold else ""
    if hold is None or (hold, reason) == (champion.hold, champion.hold_reason):
        return champion
    return replace(
        champion, hold=hold, hold_reason=reason, hold_who=cause.who, hold_at_ms=cause.now_ms, hold_operation=cause.operation
    )


def _is_by(champion: Champion, cause: Cause) -> bool:
    """Whether the hold in the log, or its end, was written by this same operation."""
    return bool(cause.operation) and champion.hold_operation == cause.operation


def _choices(state: RegistryState, champion: int) -> str:
    """What `--to` can name: the latest champions older than the present one; without any, the latest older versions."""
    older = [record for version, record in sorted(state.versions.items()) if version < champion]
    named = [record for record in older if record.champion_at_ms] or older
    if not named:
        return "No older version is announced, so there is nothing to go back to."
    shown = ", ".join(
        f"{record.version} (champion at {clock(record.champion_at_ms[-1])})" if record.champion_at_ms else f"{record.version}"
        for record in named[:-6:-1]
    )
    return f"--to can name: {shown}."
