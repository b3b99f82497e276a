"""The join's metrics, in Prometheus' names and units."""

from __future__ import annotations

import time
from collections.abc import Collection
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from stream.join.memory import Memory
from stream.join.plan import Plan
from stream.join.rebuild_progress import RebuildProgress
from stream.join.settings_history import NEVER_MS
from stream.records.example import CORRECTION

__all__ = ["JoinMetrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
# Count of a step → the value of the label `outcome` that it is added to.
_IMPRESSIONS = {"impressions": "accepted", "duplicate_impressions": "duplicate", "late_impressions": "late"}
_CLICKS = {"matched_clicks": "matched", "duplicate_clicks": "duplicate", "late_clicks": "late", "orphan_clicks": "orphan"}


class JoinMetrics:
    """The metrics of a worker; all its partitions add to them."""

    def __init__(self, prometheus: CollectorRegistry) -> None:
        counter, gauge = partial(Counter, registry=prometheus), partial(Gauge, registry=prometheus)
        seconds = partial(Histogram, registry=prometheus, buckets=_SECONDS)
        self.impressions = counter("headrace_join_impressions", "Impressions read, by what became of them.", ["outcome"])
        self.clicks = counter("headrace_join_clicks", "Clicks read, by what became of them.", ["outcome"])
        self.examples = counter("headrace_join_examples", "Labels written.", ["label"])
        self.left_out = counter(
            "headrace_join_left_out",
            "Labels left out of `examples`: negatives by join.negative_rate, and examples that are too large.",
        )
        self.corrections = counter(
            "headrace_join_corrections",
            "Labels corrected by a click that came after the hold. They also count as examples with label 1.",
        )
        self.events_ahead = counter(
            "headrace_join_events_ahead",
            "Events whose time is more than a second after their arrival at the broker: a clock is wrong.",
            ["source", "partition"],
        )
        self.foreign_examples = counter(
            "headrace_join_foreign_examples", "Records in `examples` that the join has not written; rebuilds skip them."
        )
        self.frames = counter(
            "headrace_join_frames_decoded",
            "Values of Schema Registry serializers that were decoded, by the type of their schema. Rebuilds read some again.",
            ["type"],
        )
        self.registry_failures = counter(
            "headrace_join_schema_registry_failures",
            "Requests that the schema registry did not answer, or not as expected. Each is sent again.",
        )
        self.dead_letters = counter("headrace_join_dead_letters", "Records that became dead letters.", ["reason"])
        self.pending = gauge(
            "headrace_join_pending_impressions", "Impressions whose first label is not out yet.", ["partition"]
        )
        self.early = gauge("headrace_join_early_clicks", "Clicks whose impression has not come yet.", ["partition"])
        self.watermark = gauge("headrace_join_watermark_timestamp_seconds", "Event-time watermark.", ["partition"])
        self.watermark_lag = gauge(
            "headrace_join_watermark_lag_seconds",
            "How far the watermark is behind the newest event of either source, in event time.",
            ["partition"],
        )
        self.watermark_age = gauge(
            "headrace_join_watermark_age_seconds",
            "Time since the watermark last moved, while impressions wait for it; 0 while none waits.",
            ["partition"],
        )
        self.click_coverage = gauge(
            "headrace_join_click_coverage_ratio", "Share of all clicks so far that were matched to an impression."
        )
        self.decide_seconds = seconds("headrace_join_decide_seconds", "Deciding one step.")
        self.commit_seconds = seconds("headrace_join_commit_seconds", "One transaction.")
        self.apply_seconds = seconds("headrace_join_apply_seconds", "Applying one step to the state.")
        self.takeover_seconds = seconds("headrace_join_takeover_seconds", "Taking over one partition.")
        self.rebuild_offsets = gauge(
            "headrace_join_rebuild_offsets",
            "Offsets that the current or the last takeover of a partition reads again.",
            ["partition"],
        )
        self.rebuild_read_offsets = gauge(
            "headrace_join_rebuild_read_offsets", "How many of these offsets have been read.", ["partition"]
        )
        self.low_water_offsets = gauge(
            "headrace_join_low_water_offsets",
            "Offsets from the log's start to the earliest one that a rebuild needs. Below zero no rebuild is possible.",
            ["topic", "partition"],
        )
        self.retention_left = gauge(
            "headrace_join_retention_left_seconds",
            "How long retention by time will still keep the earliest record that a rebuild needs.",
            ["topic", "partition"],
        )
        self._clicks_seen = self._clicks_matched = 0
        self._moved: dict[int, tuple[int, float]] = {}  # by partition: its watermark, and since when (monotonic)

    def observe_step(self, number: int, plan: Plan, memory: Memory, pending: int) -> None:
        """Add one step of a partition, and show where the partition is now.

        Args:
            pending: impressions whose first label is not out yet.
        """
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
        label = str(number)
        self.pending.labels(label).set(pending)
        self.early.labels(label).set(memory.early_clicks)
        newest = max(memory.impressions_seen_ms, memory.clicks_seen_ms)
        if memory.watermark_ms > NEVER_MS:
            self.watermark.labels(label).set(memory.watermark_ms / 1000)
            self.watermark_lag.labels(label).set((newest - memory.watermark_ms) / 1000)
        self.watermark_age.labels(label).set(self._unmoved_s(number, memory.watermark_ms, pending, time.monotonic()))

    def _unmoved_s(self, number: int, watermark_ms: int, pending: int, now_s: float) -> float:
        """Seconds for which impressions have waited and the watermark has not moved. Steps without records count, too."""
        last_ms, since_s = self._moved.get(number, (watermark_ms, now_s))
        if watermark_ms != last_ms or not pending:
            since_s = now_s
        self._moved[number] = (watermark_ms, since_s)
        return now_s - since_s

    def forget_partition(self, number: int) -> None:
        """Remove the series of a partition that went to another worker."""
        self._moved.pop(number, None)
        gauges = (self.pending, self.early, self.watermark, self.watermark_lag, self.watermark_age)
        for gauge in (*gauges, self.rebuild_offsets, self.rebuild_read_offsets, self.low_water_offsets, self.retention_left):
            gauge.remove_by_labels({"partition": str(number)})

    def observe_retention(self, topic: str, number: int, offsets: int, left_s: float) -> None:
        """Show how near retention is to the low-water offset of one log."""
        self.low_water_offsets.labels(topic, str(number)).set(offsets)
        self.retention_left.labels(topic, str(number)).set(left_s)

    def observe_ahead(self, impressions: bool, number: int, events: int) -> None:
        """Count events whose time is ahead of their arrival."""
        self.events_ahead.labels("impressions" if impressions else "clicks", str(number)).inc(events)

    def observe_frames(self, decoded: Collection[tuple[str, int]]) -> None:
        """Count decoded frames, by the type of their schema."""
        for kind, count in decoded:
            self.frames.labels(kind).inc(count)

    def observe_rebuild(self, progress: RebuildProgress) -> None:
        """Show how far a takeover is."""
        number = str(progress.number)
        self.rebuild_offsets.labels(number).set(progress.total)
        self.rebuild_read_offsets.labels(number).set(progress.done)
        if progress.foreign:
            self.foreign_examples.inc(progress.foreign)
            progress.foreign = 0
