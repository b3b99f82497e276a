"""A scorer's metrics, in Prometheus' names and units."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from stream.scorer.answers import Answers

__all__ = ["ScorerMetrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_ROWS = (1, 10, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 50_000)


class ScorerMetrics:
    """Registered once a worker."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter("headrace_scorer_requests", "Requests answered, by outcome.", ["outcome"], registry=registry)
        self.candidates = Counter("headrace_scorer_candidates", "Candidates scored.", registry=registry)
        self.dead_letters = Counter("headrace_scorer_dead_letters", "Requests that nobody can be told of.", registry=registry)
        self.forward_seconds = Histogram(
            "headrace_scorer_forward_seconds", "Decoding and scoring one batch.", registry=registry, buckets=_SECONDS
        )
        self.batch_candidates = Histogram(
            "headrace_scorer_batch_candidates", "Candidates in one forward pass.", registry=registry, buckets=_ROWS
        )
        self.latency_seconds = Histogram(
            "headrace_scorer_request_latency_seconds",
            "From a request's arrival at the broker to its answer's acknowledgement.",
            registry=registry,
            buckets=_SECONDS,
        )
        self.swaps = Counter("headrace_scorer_swaps", "Versions that began to answer.", registry=registry)
        self.swap_failures = Counter("headrace_scorer_swap_failures", "Versions that could not be loaded.", registry=registry)
        self.swap_seconds = Histogram(
            "headrace_scorer_swap_seconds",
            "Loading a version beside the current one.",
            registry=registry,
            buckets=_SECONDS,
        )
        self.model_version = Gauge("headrace_scorer_model_version", "Version that answers.", registry=registry)
        self.champion_version = Gauge(
            "headrace_scorer_champion_version", "Version that the registry names as champion, -1 for none.", registry=registry
        )
        self.fallback = Gauge(
            "headrace_scorer_fallback",
            "1 while the champion can't be read: an older version answers, or none.",
            registry=registry,
        )
        self.snapshot_age = Gauge("headrace_scorer_snapshot_age_seconds", "Age of the version that answers.", registry=registry)
        self.registry_age = Gauge(
            "headrace_scorer_registry_age_seconds", "Since the registry was last read to its end.", registry=registry
        )
        self.lag = Gauge("headrace_scorer_lag_records", "Requests not answered yet.", ["partition"], registry=registry)

    def watch_registry(self, age_s: Callable[[], float]) -> None:
        """Where the registry's age is read from, at each scrape."""
        self.registry_age.set_function(age_s)

    def serving(self, version: int, created_at_ms: int) -> None:
        """Another version answers."""
        self.model_version.set(version)
        self.snapshot_age.set_function(lambda: max(time.time() - created_at_ms / 1000, 0.0))

    def scored(self, answers: Answers, seconds: float) -> None:
        """Add up one batch."""
        self.forward_seconds.observe(seconds)
        self.batch_candidates.observe(answers.candidates)
        self.candidates.inc(answers.candidates)
        self.dead_letters.inc(len(answers.dead))
        for outcome, count in answers.outcomes.items():
            self.requests.labels(outcome).inc(count)

    def acknowledged(self, records: Sequence[Any]) -> None:
        """The brokers have the answers to these requests."""
        now_s = time.time()
        for record in records:
            self.latency_seconds.observe(max(now_s - record.timestamp / 1000, 0.0))
