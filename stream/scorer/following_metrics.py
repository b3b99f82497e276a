"""What a scorer reports about following the champion's chain."""

from __future__ import annotations

import time
from collections import deque

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from stream.records.delta import DeltaHeader
from stream.scorer.serving import WeightsState

__all__ = ["FollowingMetrics"]

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_LOAD_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_FRESH_SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 30, 60, 300, 3_600)
# Arrival times that wait for the first answer after their delta. A delta brings at most 64, and a scorer without requests
# would collect them for ever.
MAX_ARRIVALS = 4_096


class FollowingMetrics:
    """Registered once in a worker."""

    def __init__(self, prometheus: CollectorRegistry) -> None:
        self._deltas = Counter(
            "headrace_scorer_deltas",
            "Deltas read, by what became of them: `applied`, or the reason for which they were not.",
            ["outcome"],
            registry=prometheus,
        )
        self._rows = Counter("headrace_scorer_delta_rows", "Rows in the deltas that were applied.", registry=prometheus)
        self._prepare = Histogram(
            "headrace_scorer_delta_prepare_seconds",
            "Time to prepare a delta, beside scoring.",
            registry=prometheus,
            buckets=_SECONDS,
        )
        self._apply = Histogram(
            "headrace_scorer_delta_apply_seconds",
            "Time to apply a prepared delta, between two batches.",
            registry=prometheus,
            buckets=_SECONDS,
        )
        self._loads = Counter(
            "headrace_scorer_replica_loads",
            "Versions read from the store to follow their chain, by why: `start`, or the reason that needed healing.",
            ["why"],
            registry=prometheus,
        )
        self._load_seconds = Histogram(
            "headrace_scorer_replica_load_seconds",
            "Time to read a version to follow its chain, while what was whole last answers.",
            registry=prometheus,
            buckets=_LOAD_SECONDS,
        )
        self.failures = Counter(
            "headrace_scorer_follow_failures",
            "Failed attempts to begin following: the store or the topic `deltas` could not be read.",
            registry=prometheus,
        )
        self._following = Gauge(
            "headrace_scorer_following", "1 while a replica of the weights follows the champion's chain.", registry=prometheus
        )
        self._broken = Gauge(
            "headrace_scorer_chain_broken", "1 while the replica stays before a delta that was refused.", registry=prometheus
        )
        self._sequence = Gauge("headrace_scorer_delta_sequence", "Number of the last applied delta.", registry=prometheus)
        self._age = Gauge(
            "headrace_scorer_delta_age_seconds",
            "Time since the trainer captured the weights of the replica.",
            registry=prometheus,
        )
        self._scrubs = Counter(
            "headrace_scorer_scrubs",
            "Checks of weights in memory, by what they found: `right`, or `wrong`.",
            ["found"],
            registry=prometheus,
        )
        self._freshness = Histogram(
            "headrace_scorer_click_to_answer_seconds",
            "Time from a click's arrival in Kafka to the first answer by weights that have learned it. A sample.",
            registry=prometheus,
            buckets=_FRESH_SECONDS,
        )
        self._arrivals: deque[int] = deque(maxlen=MAX_ARRIVALS)

    def began(self, why: str, seconds: float) -> None:
        """Note that a version was read to follow its chain."""
        self._loads.labels(why).inc()
        self._load_seconds.observe(seconds)

    def follows(self, state: WeightsState) -> None:
        """Note that a replica is as far as it can be."""
        self._following.set(1)
        self._broken.set(0)
        self._at(state.point.sequence if state.point else 0, state.captured_at_ms)

    def stopped(self) -> None:
        """Note that there is no replica."""
        self._following.set(0)
        self._broken.set(0)

    def applied(self, header: DeltaHeader, prepare_s: float, apply_s: float) -> None:
        """Count a delta that was applied."""
        self._deltas.labels("applied").inc()
        self._rows.inc(header.rows)
        self._prepare.observe(prepare_s)
        self._apply.observe(apply_s)
        self._broken.set(0)
        self._at(header.sequence, header.at_ms)
        self._arrivals.extend(header.arrivals)

    def answered(self) -> None:
        """Note that a batch was scored by the replica, with all that it had learned."""
        now_ms = time.time_ns() // 1_000_000
        while self._arrivals:
            self._freshness.observe(max(now_ms - self._arrivals.popleft(), 0) / 1_000)

    def passed_over(self, reason: str) -> None:
        """Count a delta, or something damaged, that was not applied."""
        self._deltas.labels(reason).inc()

    def broke(self) -> None:
        """Note that the replica stays before a delta."""
        self._broken.set(1)

    def scrubbed(self, right: bool) -> None:
        """Count a check of the memory."""
        self._scrubs.labels("right" if right else "wrong").inc()

    def _at(self, sequence: int, captured_at_ms: int) -> None:
        self._sequence.set(sequence)
        self._age.set_function(lambda: max(time.time() - captured_at_ms / 1_000, 0.0))
