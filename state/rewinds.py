"""Rewinds: the trainer is sent back to an older version, and leaves out stretches of the log from then on. Pure.

A rollback moves scorers alone: the trainer goes on from what it has learned. A rewind takes its weights and offsets back, too.
The registry has one record of all rewinds, under a key below `alias/` that older releases ignore:

1. An operator's transaction adds a `Rewind`. It is *pending*: whichever trainer leads obeys, also one that starts later. No
   version above the target is started from.
2. The trainer loads the target and opens a new chain. Then its transaction ends the rewind, and notes the newest version of the
   line that was left (`up_to`). Versions with larger numbers are of the new line.

A trainer that dies between the two leaves the rewind pending, and the next one does it again. Once it has ended, it is never
done again. Stretches that are left out stay in the record, for every trainer to come.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

__all__ = ["REWINDS_KEY", "Rewind", "Rewinds", "SkippedRange", "begun", "joined"]

REWINDS_KEY = "alias/trainer/rewinds"
"""With a slash after `alias/trainer`, since no alias of any name has one there."""

# Rewinds kept in the record. Each is some 300 bytes. An older one is of no use: the versions that it left are deleted by then,
# or much older than the newest, which a trainer starts from.
KEPT_REWINDS = 20


class SkippedRange(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch of `examples` that is not learned: in one partition, from one offset up to but not including another.

    who, why, at_ms  who left it out, why, and when (ms since epoch)
    topic_id         Kafka's id of the topic that the offsets belong to; empty where it isn't known
    """

    partition: int
    first: int = msgspec.field(name="from")
    to: int
    who: str = ""
    why: str = ""
    at_ms: int = 0
    topic_id: str = ""

    def __len__(self) -> int:
        return self.to - self.first


class Rewind(msgspec.Struct, frozen=True, kw_only=True):
    """One rewind.

    version    the version to go on from
    operation  random id of the operation that asked for it; by it a trainer knows what it has done
    up_to      newest version of the line that was left; None while the rewind is pending
    done_at_ms, done_by, chain  when it ended, by which trainer, and the chain that began at the version
    """

    version: int
    who: str
    at_ms: int
    reason: str
    operation: str
    up_to: int | None = None
    done_at_ms: int | None = None
    done_by: str = ""
    chain: str = ""

    def leaves(self, version: int) -> bool:
        """Whether a version is of the line that this rewind left."""
        return self.version < version and (self.up_to is None or version <= self.up_to)


class Rewinds(msgspec.Struct, frozen=True, kw_only=True):
    """All rewinds, oldest first, and what is left out of the log."""

    rewinds: tuple[Rewind, ...] = ()
    skipped: tuple[SkippedRange, ...] = ()

    @property
    def pending(self) -> Rewind | None:
        """The rewind that a trainer has to do; None without one."""
        last = self.rewinds[-1] if self.rewinds else None
        return last if last is not None and last.up_to is None else None

    def left(self, version: int) -> bool:
        """Whether a trainer must not start from a version, since the trainer has been sent back to before it."""
        if self.rewinds and version == self.rewinds[-1].version:
            return False
        return any(each.leaves(version) for each in self.rewinds)

    def of(self, operation: str) -> Rewind | None:
        """The rewind that an operation asked for."""
        return next((each for each in self.rewinds if each.operation == operation), None)

    def adding(self, rewind: Rewind, skipped: Iterable[SkippedRange]) -> Rewinds:
        """With one more rewind, which is pending."""
        return Rewinds(rewinds=(*self.rewinds, rewind)[-KEPT_REWINDS:], skipped=joined(self.skipped, skipped))

    def ending(self, operation: str, *, up_to: int, who: str, at_ms: int, chain: str) -> Rewinds:
        """With a rewind, and those before it that nobody has done, ended. The same where it has ended already."""
        rewinds = list(self.rewinds)
        at = next((index for index, each in enumerate(rewinds) if each.operation == operation), -1)
        for index, each in enumerate(rewinds[: at + 1]):
            if each.up_to is None:
                rewinds[index] = msgspec.structs.replace(
                    each, up_to=max(up_to, each.version), done_at_ms=at_ms, done_by=who, chain=chain
                )
        return msgspec.structs.replace(self, rewinds=tuple(rewinds))


def joined(*ranges: Iterable[SkippedRange]) -> tuple[SkippedRange, ...]:
    """All ranges, each once, by partition and offset. Overlapping ones stay apart: each says who left it out and why."""
    found: dict[tuple[str, int, int, int], SkippedRange] = {}
    for each in (each for some in ranges for each in some):
        found.setdefault((each.topic_id, each.partition, each.first, each.to), each)
    return tuple(found[key] for key in sorted(found))


def begun(skipped: Iterable[SkippedRange], offsets: Mapping[int, int]) -> tuple[SkippedRange, ...]:
    """The ranges that training has reached, by the next offset to train of each partition: a manifest names these."""
    return tuple(each for each in skipped if each.first < offsets.get(each.partition, 0))
