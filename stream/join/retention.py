"""Measures once a minute how near retention is to what a rebuild of the join's state needs, and warns when it is near.

A partition's low-water offset in each of its three logs is the earliest one that something pending or remembered still needs.
Once retention has deleted that record, a worker without local state can't take the partition over any more. When a source has
stalled, impressions stay pending and the low-water offset doesn't move, while retention comes closer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from aiokafka.structs import TopicPartition

from stream.join.memory import LowWater
from stream.join.metrics import JoinMetrics
from stream.kafka.clients import quietly_stopped, started
from stream.kafka.cluster import topic_configs
from stream.kafka.read_log import Span, first_records, log_consumer, log_spans
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

__all__ = ["Margin", "RetentionWatch"]

log = logging.getLogger(__name__)

# Retention moves by whole segments, usually hours at a time. Each look costs a fetch of one batch for each log.
LOOK_EVERY_S = 60.0
# Warn when less than this share of the topic's retention is left: 1.4 days of the default 7.
NEAR = 0.2
# Longest time to read the records at the low-water offsets. Logs without an answer by then have no arrival time in this look.
READ_S = 5.0


@dataclass(frozen=True, slots=True)
class Margin:
    """How near retention is to the low-water offset, in one log of one partition.

    offsets      from the log's start to the low-water offset; negative when retention has passed it
    left_s       until retention by time reaches the low-water offset. Infinite when no record is there or after it, or when
                 retention by time is off; negative when the record is overdue and its segment not deleted yet
    retention_s  the topic's `retention.ms`
    """

    offsets: int
    left_s: float
    retention_s: float

    @classmethod
    def of(cls, *, low: int, start: int, arrival_ms: int | None, retention_ms: int, now_ms: float) -> Margin:
        """The margin of a log.

        Args:
            arrival_ms: of the first record at or after `low`, None without one.
            retention_ms: -1 when retention by time is off.
        """
        left_s = float("inf")
        if arrival_ms is not None and retention_ms >= 0:
            left_s = (arrival_ms + retention_ms - now_ms) / 1000
        return cls(low - start, left_s, retention_ms / 1000)

    @property
    def problem(self) -> str | None:
        """What is wrong, None when nothing is."""
        if self.offsets < 0:
            return (
                f"retention has deleted {-self.offsets} offsets that a rebuild needs: only the state folder of this worker "
                "still has what was in them, so don't lose it"
            )
        if self.left_s < NEAR * self.retention_s:
            left = f"in {self.left_s / 3600:.1f} h" if self.left_s > 0 else "any time now"
            return f"retention reaches what a rebuild needs {left} (it is {self.retention_s / 3600:.1f} h)"
        return None


class _Arrival(NamedTuple):
    """When the first record at or after a low-water offset arrived."""

    low: int
    at_ms: int


class RetentionWatch:
    """Watches every partition number that a worker owns.

    Args:
        low_water: returns the low-water offsets of the partition numbers owned now.
    """

    def __init__(
        self, kafka: KafkaSettings, names: TopicNames, metrics: JoinMetrics, low_water: Callable[[], Mapping[int, LowWater]]
    ) -> None:
        self._kafka, self._metrics, self._low_water = kafka, metrics, low_water
        self._topics = (names.impressions, names.clicks, names.examples)
        self._arrivals: dict[TopicPartition, _Arrival] = {}
        self._near: set[TopicPartition] = set()

    async def run(self) -> None:
        """Look until cancelled. An error here is logged and does not end the join."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                await self.look()
            except Exception as error:
                log.warning("could not look how near retention is, trying again in %.0f s: %r", LOOK_EVERY_S, error)

    async def look(self) -> dict[TopicPartition, Margin]:
        """Look once, set the metrics, and warn about logs that retention has come near to since the last look."""
        low = {
            TopicPartition(topic, number): offset
            for number, offsets in self._low_water().items()
            for topic, offset in zip(self._topics, offsets, strict=True)
        }
        if not low:
            return {}
        retention_ms = await self._retention()
        kafka = self._kafka
        consumer = log_consumer(kafka, committed=False, max_partition_fetch_bytes=1)
        await started(kafka, consumer, "how near retention is")
        try:
            logs = await log_spans(kafka, consumer, list(low))
            arrivals = await self._read_arrivals(
                consumer, {tp: Span(max(offset, logs[tp].start), logs[tp].end) for tp, offset in low.items()}
            )
        finally:
            await quietly_stopped(consumer.stop)
        owned = self._low_water()  # a partition may have gone to another worker meanwhile
        margins = {
            tp: Margin.of(
                low=offset,
                start=logs[tp].start,
                arrival_ms=arrivals.get(tp),
                retention_ms=retention_ms.get(tp.topic, -1),  # absent where we lack the permission to ask
                now_ms=time.time() * 1000,
            )
            for tp, offset in low.items()
            if tp.partition in owned
        }
        self._report(margins)
        return margins

    async def _retention(self) -> dict[str, int]:
        """`retention.ms` of each topic in the cluster."""
        configs = await topic_configs(self._kafka, self._topics, ("retention.ms",))
        return {topic: int(found["retention.ms"]) for topic, found in configs.items() if "retention.ms" in found}

    async def _read_arrivals(self, consumer: Any, left: Mapping[TopicPartition, Span]) -> dict[TopicPartition, int]:
        """When the first record at or after each low-water offset arrived, where there is one.

        It is not read again while the low-water offset stays the same.
        """
        self._arrivals = {tp: known for tp, known in self._arrivals.items() if tp in left and left[tp].start == known.low}
        wanted = {tp: span for tp, span in left.items() if tp not in self._arrivals}
        first = await first_records(consumer, wanted, within_s=READ_S)
        self._arrivals |= {tp: _Arrival(left[tp].start, record.timestamp) for tp, record in first.items() if record is not None}
        return {tp: known.at_ms for tp, known in self._arrivals.items()}

    def _report(self, margins: Mapping[TopicPartition, Margin]) -> None:
        for tp, margin in margins.items():
            self._metrics.observe_retention(tp.topic, tp.partition, margin.offsets, margin.left_s)
            if margin.problem is not None and tp not in self._near:
                log.warning(
                    "%s, partition %d: %s. Raise `topics.retention_ms` (`headrace topics create --mend`), and find what holds "
                    "the watermark back: `headrace doctor`.",
                    *(tp.topic, tp.partition, margin.problem),
                )
        self._near = {tp for tp, margin in margins.items() if margin.problem is not None}
