"""The join's metrics, in Prometheus' names and units."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from stream.join.plan import Plan
from stream.join.rebuild_progress import RebuildProgress
from stream.join.settings_history import NEVER_MS
from stream.records.example import CORRECTION

if TYPE_CHECKING:
    from stream.join.partition import PartitionJoin

__all__ = ["JoinMetrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
# counts of a step → the `outcome` label under which they are summed
_IMPRESSIONS = {"impressions": "accepted", "duplicate_impressions": "duplicate", "late_impressions": "late"}
_CLICKS = {"matched_clicks": "matched", "duplicate_clicks": "duplicate", "late_clicks": "late", "orphan_clicks": "orphan"}


class JoinMetrics:
    """Registered once a worker; every partition reports through it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.impressions = Counter(
            "headrace_join_impressions", "Impressions read, by what became of them.", ["outcome"], registry=registry
        )
        self.clicks = Counter("headrace_join_clicks", "Clicks read, by what became of them.", ["outcome"], registry=registry)
        self.examples = Counter("headrace_join_examples", "Labels written.", ["label"], registry=registry)
        self.left_out = Counter(
            "headrace_join_left_out",
            "Labels left out of `examples`: negatives by join.negative_rate, and what is too large.",
            registry=registry,
        )
        self.corrections = Counter(
            "headrace_join_corrections",
            "Labels corrected by a click that came after the hold; they count among the examples with label 1, too.",
            registry=registry,
        )
        self.events_ahead = Counter(
            "headrace_join_events_ahead",
            "Events whose time is more than a second after their arrival at the broker: a clock is wrong.",
            ["source", "partition"],
            registry=registry,
        )
        self.foreign_examples = Counter(
            "headrace_join_foreign_examples",
            "Records in `examples` that the join has not written, passed over by rebuilds.",
            registry=registry,
        )
        self.frames = Counter(
            "headrace_join_frames_decoded",
            "Values of Schema Registry serializers that were decoded, by the type of their schema; rebuilds read some again.",
            ["type"],
            registry=registry,
        )
        self.registry_failures = Counter(
            "headrace_join_schema_registry_failures",
            "Questions to the schema registry that it did not answer, or not as it should; each is asked again.",
            registry=registry,
        )
        self.dead_letters = Counter("headrace_join_dead_letters", "Records refused.", ["reason"], registry=registry)
        self.pending = Gauge(
            "headrace_join_pending_impressions",
            "Impressions whose first label is not out yet.",
            ["partition"],
            registry=registry,
        )
        self.early = Gauge("headrace_join_early_clicks", "Clicks without an impression yet.", ["partition"], registry=registry)
        self.watermark = Gauge(
            "headrace_join_watermark_timestamp_seconds", "Event-time watermark.", ["partition"], registry=registry
        )
        self.watermark_lag = Gauge(
            "headrace_join_watermark_lag_seconds",
            "How far the watermark is behind the newest event of either source, in event time.",
            ["partition"],
            registry=registry,
        )
        self.watermark_age = Gauge(
            "headrace_join_watermark_age_seconds",
            "Since the watermark last moved, while impressions wait for it; 0 while none waits.",
            ["partition"],
            registry=registry,
        )
        self.click_coverage = Gauge(
            "headrace_join_click_coverage_ratio", "Clicks matched to an impression, of all clicks so far.", registry=registry
        )
        self.decide_seconds = Histogram(
            "headrace_join_decide_seconds", "Deciding one step.", registry=registry, buckets=_SECONDS
        )
        self.commit_seconds = Histogram("headrace_join_commit_seconds", "One transaction.", registry=registry, buckets=_SECONDS)
        self.apply_seconds = Histogram(
            "headrace_join_apply_seconds", "Applying one step to the state.", registry=registry, buckets=_SECONDS
        )
        self.takeover_seconds = Histogram(
            "headrace_join_takeover_seconds", "Taking over one partition.", registry=registry, buckets=_SECONDS
        )
        self.rebuild_offsets = Gauge(
            "headrace_join_rebuild_offsets",
            "Offsets that taking over a partition reads again, or has last read.",
            ["partition"],
            registry=registry,
        )
        self.rebuild_read_offsets = Gauge(
            "headrace_join_rebuild_read_offsets", "How many of them have been read.", ["partition"], registry=registry
        )
        self.low_water_offsets = Gauge(
            "headrace_join_low_water_offsets",
            "From the log's start to the earliest offset that a rebuild needs; below zero it can't be rebuilt any more.",
            ["topic", "partition"],
            registry=registry,
        )
        self.retention_left = Gauge(
            "headrace_join_retention_left_seconds",
            "How long retention by time still keeps the earliest record that a rebuild needs.",
            ["topic", "partition"],
            registry=registry,
        )
        self._clicks_seen = self._clicks_matched = 0
        self._moved: dict[int, tuple[int, float]] = {}  # by partition: its watermark, and since when (monotonic)

    def observe(self, partition: PartitionJoin, plan: Plan) -> None:
        """Add up one step."""
        counts = plan.counts
        for name, outcome in _IMPRESSIONS.items():
            if counts[name]:
                self.impressions.labels(outcome).inc(counts[name])
        for name, outcome in _CLICKS.items():
            if counts[name]:
                self.clicks.labels(outcome).inc(counts[name])
        positives = len(plan.examples) - counts["negatives"]
        if positives:
            self.examples.labels("1").inc(positives)
        if counts["negatives"]:
            self.examples.labels("0").inc(counts["negatives"])
        corrections = sum(example.kind == CORRECTION for example in plan.examples) if positives else 0
        if corrections:
            self.corrections.inc(corrections)
        if plan.left_out:
            self.left_out.inc(len(plan.left_out))
        for letter in plan.dead:
            self.dead_letters.labels(letter.reason).inc()
        self._clicks_seen += counts["clicks"]
        self._clicks_matched += counts["matched_clicks"]
        if self._clicks_seen:
            self.click_coverage.set(self._clicks_matched / self._clicks_seen)
        number, memory = str(partition.number), partition.memory
        self.pending.labels(number).set(partition.pending)
        self.early.labels(number).set(memory.early_clicks)
        newest = max(memory.impressions_seen_ms, memory.clicks_seen_ms)
        if memory.watermark_ms > NEVER_MS:
            self.watermark.labels(number).set(memory.watermark_ms / 1000)
            self.watermark_lag.labels(number).set((newest - memory.watermark_ms) / 1000)
        self.watermark_age.labels(number).set(self._standing_s(partition, time.monotonic()))

    def _standing_s(self, partition: PartitionJoin, now_s: float) -> float:
        """Seconds for which impressions have waited and the watermark has not moved. Steps without records ask too."""
        mark_ms = partition.memory.watermark_ms
        last_ms, since_s = self._moved.get(partition.number, (mark_ms, now_s))
        if mark_ms != last_ms or not partition.pending:
            since_s = now_s
        self._moved[partition.number] = (mark_ms, since_s)
        return now_s - since_s

    def forget_partition(self, number: int) -> None:
        """Drop the series of a partition that went to another worker."""
        self._moved.pop(number, None)
        gauges = (self.pending, self.early, self.watermark, self.watermark_lag, self.watermark_age)
        for gauge in (*gauges, self.rebuild_offsets, self.rebuild_read_offsets, self.low_water_offsets, self.retention_left):
            gauge.remove_by_labels({"partition": str(number)})

    def observe_retention(self, topic: str, number: int, offsets: int, left_s: float) -> None:
        """How near retention is to the low water of one log."""
        self.low_water_offsets.labels(topic, str(number)).set(offsets)
        self.retention_left.labels(topic, str(number)).set(left_s)

    def observe_ahead(self, impressions: bool, number: int, events: int) -> None:
        """Count events ahead of their arrival."""
        self.events_ahead.labels("impressions" if impressions else "clicks", str(number)).inc(events)

    def observe_frames(self, decoded: Collection[tuple[str, int]]) -> None:
        """Count decoded frames, by the type of their schema."""
        for kind, count in decoded:
            self.frames.labels(kind).inc(count)

    def observe_rebuild(self, progress: RebuildProgress) -> None:
        """How far taking over a partition is."""
        number = str(progress.number)
        self.rebuild_offsets.labels(number).set(progress.total)
        self.rebuild_read_offsets.labels(number).set(progress.done)
        if progress.foreign:
            self.foreign_examples.inc(progress.foreign)
            progress.foreign = 0
