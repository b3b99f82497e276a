"""When a version is due because Kafka will soon delete deltas that came after the newest one.

A scorer that starts takes the newest version and reads the deltas after it. Kafka deletes deltas by age and by size. A stream
with few examples, or a large `snapshots.min_examples`, may bring no other reason to write a version in that time.
"""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

from aiokafka.errors import KafkaError

from stream.errors import NoAnswer
from stream.kafka.cluster import topic_configs
from stream.settings import KafkaSettings

__all__ = ["Limits", "LogRetention", "Mark"]

log = logging.getLogger(__name__)

# Part of the retention at which a version is due. The other half is for writing it, for a store that is away, and for scorers
# that are still reading: half an hour by default, and a version of 10 million rows is written in ten seconds.
SHARE = 0.5
# Shortest time between two versions for this reason: a store that fails, or a retention of less than what one version changes,
# must not make a trainer write versions one after another.
AGAIN_S = 60.0
KEYS = ("retention.ms", "retention.bytes")


class Limits(NamedTuple):
    """How long, and up to which size, deltas are kept; infinite where there is no limit."""

    age_s: float = math.inf
    size: float = math.inf


class Mark(NamedTuple):
    """A moment: bytes of deltas that were sent until then, and when it was (monotonic)."""

    size: int
    at_s: float


class LogRetention:
    """Counts what has come in `deltas` since the newest version. No clock: times are monotonic seconds that the caller gives.

        retention.sent(sent.size)
        if retention.is_due(now_s):
            mark = retention.tried(now_s)
            ...                                  # a version of that moment is written and announced
            retention.announced(mark)

    Args:
        newest: the moment of the version that training goes on from: its age, and the bytes that came after it.
    """

    def __init__(self, limits: Limits | None = None, newest: Mark | None = None, *, before: int = 0) -> None:
        self.limits = limits or Limits()
        newest = newest or Mark(0, 0.0)
        self._newest, self._size, self._not_before_s = newest, newest.size + before, -math.inf

    def sent(self, size: int) -> None:
        """A delta was written."""
        self._size += size

    def is_due(self, now_s: float) -> bool:
        """Whether half of what `deltas` keeps has come, or passed, since the newest version."""
        since = self._size - self._newest.size
        if not since or now_s < self._not_before_s:
            return False
        return since >= SHARE * self.limits.size or now_s - self._newest.at_s >= SHARE * self.limits.age_s

    def tried(self, now_s: float) -> Mark:
        """A version is captured now, for whatever reason."""
        self._not_before_s = now_s + AGAIN_S
        return Mark(self._size, now_s)

    def announced(self, mark: Mark) -> None:
        """The version that was captured at a moment is announced, and is a point of the chain."""
        self._newest = mark

    async def look(self, kafka: KafkaSettings, topic: str) -> None:
        """Read the topic's retention as it is now. Where it can't be read, the last one stays in force."""
        try:
            found = (await topic_configs(kafka, (topic,), KEYS)).get(topic, {})
        except (KafkaError, NoAnswer) as error:
            log.warning("%s: its retention can't be read: %s", topic, error)
            return
        age_ms, size = (_limit(found.get(key)) for key in KEYS)
        self.limits = Limits(age_ms / 1_000, size)


def _limit(value: str | None) -> float:
    """A limit of Kafka's: none where it is negative, or can't be read."""
    try:
        found = int(value or -1)
    except ValueError:
        return math.inf
    return math.inf if found < 0 else float(found)
