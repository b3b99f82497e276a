"""A scorer's metrics, in Prometheus' names and units."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

__all__ = ["ScorerMetrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_ROWS = (1, 10, 50, 100, 500, 1_000, 5_000, 10_000, 50_000)


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
            "From a request's arrival at the broker to its answer's acknowledgement, the oldest of each batch.",
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
        self.snapshot_age = Gauge("headrace_scorer_snapshot_age_seconds", "Age of the version that answers.", registry=registry)
        self.lag = Gauge("headrace_scorer_lag_records", "Requests not taken yet.", ["partition"], registry=registry)
