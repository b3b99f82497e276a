"""Whether a shadow or canary goes on, by everything that the registry says."""

from __future__ import annotations

from state.canary import Canary
from state.registry import RegistryState

__all__ = ["running_canary", "why_over"]


def why_over(state: RegistryState) -> str:
    """Why the trial in the record is over although nobody has ended it; empty if it goes on, or if there is none.

    A rollback ends a trial, so that everybody serves its target: scorers see it in the registry at once, and the trainer enters
    the outcome later.
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
