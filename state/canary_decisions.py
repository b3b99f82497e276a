"""Changes of a shadow or canary. As in `state.decisions`, each function looks at the state and returns the records to write."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from msgspec.structs import replace

from state import decisions
from state.canary import CANARY_KEY, Canary, CanaryOutcome, Mode, Progress, Thresholds
from state.canary_running import ended, held_since, running_canary, why_over
from state.changes import Cause, Change, clock
from state.errors import Refused
from state.registry import KeyedRecord, RegistryState

__all__ = ["CanaryChanged", "begin_canary", "command_of", "end_canary", "note_progress"]

# Beyond half of the requests the champion would have less evidence than the candidate, and a bad candidate most of the users.
MAX_CANARY_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class CanaryChanged:
    """The record after a change.

    changed  False when it was so already, and nothing was written
    undo     the command that restores what was before; None when nothing was changed
    """

    canary: Canary
    changed: bool
    undo: str | None


def begin_canary(
    state: RegistryState, mode: Mode, version: int, share: float, thresholds: Thresholds, cause: Cause
) -> Change[CanaryChanged]:
    """Give a version a share of the requests.

    Raises:
        Refused: the version can't be a candidate, the share can't be given, or another trial runs.
    """
    decisions.announced(state, version)
    most = 1.0 if mode == "shadow" else MAX_CANARY_SHARE
    if not 0 < share <= most:
        raise Refused(
            f"{mode} of version {version}: expected a share above 0 and at most {most:.0%} of the requests, found {share:.4%}. "
            + ("Name another share." if mode == "shadow" else "A larger share can be scored as a shadow.")
        )
    champion = state.champion.version
    if champion is None:
        raise Refused(
            f"{mode} of version {version}: expected a champion to compare it with, found none. "
            f"`headrace snapshot promote {version}` makes it the champion."
        )
    if champion == version:
        raise Refused(f"{mode} of version {version}: expected another version than the champion, found the champion itself.")
    if state.champion.was_rolled_back(version):
        raise Refused(
            f"{mode} of version {version}: expected a version that nobody has rolled back, found one that was. "
            f"`headrace snapshot promote {version}` vouches for it."
        )
    other = running_canary(state)
    if other is not None:
        raise Refused(
            f"{mode} of version {version}: expected no other trial, found a {other.mode} of version {other.version} by "
            f"{other.who}. End it first: `headrace snapshot canary stop`."
        )
    canary = Canary(
        mode=mode,
        version=version,
        share=share,
        # Clocks of machines differ. A trial is later than the champion's last move, or an earlier rollback would end it.
        at_ms=max(cause.now_ms, state.champion.at_ms + 1),
        who=cause.who,
        reason=cause.reason,
        operation=cause.operation,
        hold_operation=state.champion.hold_operation,
        thresholds=thresholds,
    )
    return Change(
        (KeyedRecord(CANARY_KEY, canary),), CanaryChanged(canary, True, "headrace snapshot canary stop --reason undo --yes")
    )


def end_canary(state: RegistryState, outcome: CanaryOutcome, cause: Cause, *, of: str = "") -> Change[CanaryChanged]:
    """End the trial. Where it is promoted, the candidate becomes champion in the same transaction.

    A trial that has ended stays as it is. One that is over already, because of a rollback say, is stopped and not promoted:
    whoever wants to promote it has decided on an older state.

    Args:
        of: the operation that began the trial, so that a late decision never ends the next trial; any when empty.

    Raises:
        Refused: the candidate can't become champion, or somebody has held auto-promotion since the trial began.
    """
    before = state.canary
    if not before.runs or (of and before.operation != of):
        return Change((), CanaryChanged(before, False, None))
    reason = cause.reason
    if outcome == "promoted":
        champion = state.champion
        if over := why_over(state):
            outcome, reason = "stopped", over
        elif held_since(state):
            raise Refused(
                f"{before.mode} of version {before.version}: expected auto-promotion to be as it was when the trial began, "
                f"found it held by {champion.hold_who} since {clock(champion.hold_at_ms)} ({champion.hold_reason}). "
                "`headrace snapshot resume` lets it go on."
            )
    after = ended(before, outcome, reason, cause)
    records = (KeyedRecord(CANARY_KEY, after),)
    if outcome != "promoted":
        return Change(records, CanaryChanged(after, True, command_of(before)))
    moved = decisions.promote(state, before.version, cause)
    undo = moved.outcome.undo
    return Change((*moved.records, *records), CanaryChanged(after, True, None if undo is None else undo.command))


def note_progress(state: RegistryState, of: str, progress: Progress) -> Change[CanaryChanged]:
    """Note in the record what the trainer knows of the trial that `of` began. Nothing is noted once it has ended."""
    before = state.canary
    if not before.runs or before.operation != of or before.progress == progress:
        return Change((), CanaryChanged(before, False, None))
    after = replace(before, progress=progress)
    return Change((KeyedRecord(CANARY_KEY, after),), CanaryChanged(after, True, None))


def command_of(canary: Canary) -> str:
    """The command that begins a trial like this one."""
    words = ["headrace", "snapshot", canary.mode, str(canary.version), "--share", f"{canary.share * 100:g}%"]
    words += ["--reason", canary.reason or "again"]
    usual, wanted = Thresholds(), canary.thresholds
    if wanted.clicks != usual.clicks:
        words += ["--clicks", str(wanted.clicks)]
    if wanted.loss_margin != usual.loss_margin:
        words += ["--loss-margin", f"{wanted.loss_margin * 100:g}%"]
    if wanted.calibration_margin != usual.calibration_margin:
        words += ["--calibration-margin", f"{wanted.calibration_margin * 100:g}%"]
    if wanted.ctr_margin != usual.ctr_margin:
        words += ["--ctr-margin", f"{wanted.ctr_margin * 100:g}%"]
    if wanted.limit_ms != usual.limit_ms:
        words += ["--limit", f"{wanted.limit_ms}ms"]
    return shlex.join(words)
