"""Whether a shadow or canary goes on, by everything that the registry says."""

from __future__ import annotations

from msgspec.structs import replace

from state.canary import CANARY_KEY, Canary, CanaryOutcome
from state.changes import Cause
from state.registry import KeyedRecord, RegistryState

__all__ = ["ended", "held_since", "running_canary", "stopped_by_rollback", "why_over"]


def why_over(state: RegistryState) -> str:
    """Why the trial in the record is over although nobody has ended it; empty if it goes on, or if there is none.

    A rollback ends a trial in its own transaction (`stopped_by_rollback`). One by an older release leaves the record as it is;
    scorers see from the champion's moves that the trial is over, and the trainer enters the outcome later.
    """
    canary, champion = state.canary, state.champion
    if not canary.runs:
        return ""
    if canary.version not in state.versions:
        return f"version {canary.version} is deleted"
    if any(move.how == "rollback" and move.at_ms > canary.at_ms for move in champion.moves):
        return "the champion was rolled back"
    if champion.was_rolled_back(canary.version):
        return f"version {canary.version} was rolled back"
    if champion.version == canary.version:
        return f"version {canary.version} is champion"
    return ""


def running_canary(state: RegistryState) -> Canary | None:
    """The trial that scorers and trainer take part in; None while there is none."""
    return state.canary if state.canary.runs and not why_over(state) else None


def held_since(state: RegistryState) -> bool:
    """Whether auto-promotion is held, and wasn't when the trial in the record began. By operations, since clocks differ."""
    return state.champion.hold and state.champion.hold_operation != state.canary.hold_operation


def ended(canary: Canary, outcome: CanaryOutcome, reason: str, cause: Cause) -> Canary:
    """The record of a trial that ends now."""
    return replace(
        canary,
        outcome=outcome,
        ended_at_ms=max(cause.now_ms, canary.at_ms + 1),
        ended_who=cause.who,
        ended_reason=reason,
        ended_operation=cause.operation,
    )


def stopped_by_rollback(state: RegistryState, cause: Cause) -> tuple[KeyedRecord, ...]:
    """What a rollback writes besides: the end of the trial that runs, so that everybody serves its target."""
    if not state.canary.runs:
        return ()
    reason = f"the champion was rolled back: {cause.reason}"
    return (KeyedRecord(CANARY_KEY, ended(state.canary, "stopped", reason, cause)),)
