"""Changes of the registry that concern the gate. As in `state.decisions`, they look at the state and return the records."""

from __future__ import annotations

from state.changes import Cause, Change
from state.errors import Refused
from state.gate_release import RELEASE_KEY, GateRelease, Released
from state.registry import KeyedRecord, RegistryState

__all__ = ["release"]


def release(state: RegistryState, cause: Cause) -> Change[Released]:
    """Release what the gate withholds of the line that is trained. The trainer carries it out.

    Raises:
        Refused: no version with a gate's report was ever announced.
    """
    newest = state.versions.get(max(state.versions, default=0))
    if newest is None or newest.verdict is None:
        raise Refused(
            "release: expected a newest version with a report of the gate, found none. Nothing was released; look at "
            "`headrace snapshot list`."
        )
    line, withheld = newest.line, state.withheld
    record = GateRelease(line=line, who=cause.who, at_ms=cause.now_ms, reason=cause.reason, operation=cause.operation)
    said, since_ms = (None, None) if withheld is None else (withheld.reason, withheld.since_ms)
    return Change((KeyedRecord(RELEASE_KEY, record),), Released(line, said, since_ms))
