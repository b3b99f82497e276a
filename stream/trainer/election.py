"""How a group of trainers chooses its leader.

Every trainer sends a `Claim` with its request to join. Kafka hands all claims to one of them, whose `Assignor` chooses, and
passes its answer on to all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment, ConsumerProtocolMemberMetadata
from aiokafka.structs import TopicPartition

__all__ = ["TAKE_OVER_AGAIN_MS", "Assignor", "Choice", "Claim", "chosen"]

# A leader that took over is safe from another take-over for this long. Two trainers that a supervisor always starts with
# `--take-over` would otherwise end each other again and again. Kubernetes waits up to 5 minutes before it starts a process
# again, so the limit is longer than that.
TAKE_OVER_AGAIN_MS = 600_000


class Claim(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a trainer says of itself when it joins the group.

    who         host and process, for people
    since       generation of the group in which it was chosen; 0 while it doesn't lead
    version     newest version whose state it has loaded; -1 for none
    started_ms  when the process started (wall clock, ms since epoch)
    asks        whether it asks to take over from a leader that is there
    asked_ms    when it asked; 0 if never. A leader keeps it
    """

    who: str = "a trainer"
    since: int = 0
    version: int = -1
    started_ms: int = 0
    asks: bool = False
    asked_ms: int = 0


class Choice(msgspec.Struct, frozen=True):
    """Which member of the group leads, and what it said of itself. Every member receives it."""

    member: str
    claim: Claim


def chosen(claims: Mapping[str, Claim]) -> str:
    """The member that leads, of all members that have joined.

    - A leader stays leader, whoever joins.
    - One that asks to take over replaces a leader, unless that leader has itself taken over in the last ten minutes.
    - Without a leader: one that asks; then one with the newest state; then the one that was started last, because in a rolling
      update the others are about to be stopped.
    """
    leading = [each for each, claim in claims.items() if claim.since]
    asked = [each for each, claim in claims.items() if claim.asks]
    leader = max(leading, key=lambda each: (claims[each].since, each), default=None)
    asking = max(asked, key=lambda each: (claims[each].asked_ms, each), default=None)
    if asking is not None and (leader is None or not _too_soon(claims[asking], claims[leader])):
        return asking
    return leader or max(claims, key=lambda each: (claims[each].version, claims[each].started_ms, each))


def _too_soon(asking: Claim, leader: Claim) -> bool:
    return asking.asked_ms - leader.asked_ms < TAKE_OVER_AGAIN_MS


class Assignor:
    """Chooses the leader, in the client of the member that the broker asks to. aiokafka takes the object as a strategy."""

    name = "headrace-leader"

    def __init__(self, partition: TopicPartition, claim: Callable[[], bytes], hear: Callable[[Choice | None], None]) -> None:
        self._partition, self._claim, self._hear = partition, claim, hear

    def metadata(self, topics: Iterable[str]) -> ConsumerProtocolMemberMetadata:
        """What this member sends with its request to join."""
        return ConsumerProtocolMemberMetadata(0, list(topics), self._claim())

    def assign(self, cluster: Any, members: Mapping[str, Any]) -> dict[str, ConsumerProtocolMemberAssignment]:
        """What each member is sent: the partition for the leader, nothing for the others, and to all of them who leads."""
        claims = {member: _decoded(metadata.user_data, Claim) or Claim() for member, metadata in members.items()}
        leader = chosen(claims)
        told = msgspec.json.encode(Choice(leader, claims[leader]))
        partitions = [(self._partition.topic, [self._partition.partition])]
        return {member: ConsumerProtocolMemberAssignment(0, partitions if member == leader else [], told) for member in members}

    def on_assignment(self, assignment: Any) -> None:
        """What this member was sent. Called before `on_partitions_assigned`."""
        self._hear(_decoded(assignment.user_data, Choice))


def _decoded(data: bytes | None, kind: type[Any]) -> Any:
    """What another trainer has written, None where that can't be read: it may be of another release."""
    try:
        return msgspec.json.decode(data or b"", type=kind)
    except msgspec.DecodeError:
        return None
