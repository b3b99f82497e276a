"""A scorer's metrics, with names and units as Prometheus recommends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from stream.records.record import Record
from stream.scorer.answers import Answers
from stream.scorer.serving import Served

__all__ = ["ScorerMetrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_ROWS = (1, 10, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 50_000)


class ScorerMetrics:
    """Registered once in a worker."""

    def __init__(self, prometheus: CollectorRegistry) -> None:
        self.requests = Counter("headrace_scorer_requests", "Requests answered, by outcome.", ["outcome"], registry=prometheus)
        self.candidates = Counter("headrace_scorer_candidates", "Candidates scored.", registry=prometheus)
        self.dead_letters = Counter(
            "headrace_scorer_dead_letters", "Requests without a readable id: they become dead letters.", registry=prometheus
        )
        self.forward_seconds = Histogram(
            "headrace_scorer_forward_seconds", "Time to decode and score one batch.", registry=prometheus, buckets=_SECONDS
        )
        self.batch_candidates = Histogram(
            "headrace_scorer_batch_candidates", "Candidates in one forward pass.", registry=prometheus, buckets=_ROWS
        )
        self.latency_seconds = Histogram(
            "headrace_scorer_request_latency_seconds",
            "Time from a request's arrival at the broker to the acknowledgement of its answer.",
            registry=prometheus,
            buckets=_SECONDS,
        )
        self.swaps = Counter("headrace_scorer_swaps", "Times that another version began to answer.", registry=prometheus)
        self.swap_failures = Counter(
            "headrace_scorer_swap_failures", "Attempts to load a version that failed.", registry=prometheus
        )
        self.swap_seconds = Histogram(
            "headrace_scorer_swap_seconds",
            "Time to load a version, while the current one answers.",
            registry=prometheus,
            buckets=_SECONDS,
        )
        self._files = Counter(
            "headrace_scorer_version_files",
            "Files of versions read, by where they came from: the folder `scorer.cache_dir`, or the store. Nothing is counted "
            "without such a folder.",
            ["source"],
            registry=prometheus,
        )
        self.model_version = Gauge("headrace_scorer_model_version", "Version that answers.", registry=prometheus)
        self.champion_version = Gauge(
            "headrace_scorer_champion_version", "Version that the registry names as champion, -1 for none.", registry=prometheus
        )
        self.fallback = Gauge(
            "headrace_scorer_fallback",
            "1 while the champion can't be read, so that an older version answers, or none.",
            registry=prometheus,
        )
        self.snapshot_age = Gauge(
            "headrace_scorer_snapshot_age_seconds", "Time since the weights that answer were captured.", registry=prometheus
        )
        self.registry_age = Gauge(
            "headrace_scorer_registry_age_seconds", "Time since the registry was last read to its end.", registry=prometheus
        )
        self.lag = Gauge(
            "headrace_scorer_lag_records",
            "Requests of a partition that are not answered yet.",
            ["partition"],
            registry=prometheus,
        )

    def watch_registry(self, age_s: Callable[[], float]) -> None:
        """Set the function that gives the registry's age at each scrape."""
        self.registry_age.set_function(age_s)

    def read_file(self, cached: bool) -> None:
        """A file of a version was read, from the folder `scorer.cache_dir` or from the store."""
        self._files.labels("cache" if cached else "store").inc()

    def serving(self, served: Served) -> None:
        """Note that other weights answer, or the same under the name of another version."""
        self.model_version.set(served.version)
        self.snapshot_age.set_function(lambda: max(time.time() - served.state.captured_at_ms / 1000, 0.0))

    def scored(self, answers: Answers, seconds: float) -> None:
        """Count one batch."""
        self.forward_seconds.observe(seconds)
        self.batch_candidates.observe(answers.candidates)
        self.candidates.inc(answers.candidates)
        self.dead_letters.inc(len(answers.dead))
        for outcome, count in answers.outcomes.items():
            self.requests.labels(outcome).inc(count)

    def acknowledged(self, records: Sequence[Record]) -> None:
        """Note that the brokers have the answers to these requests."""
        now_s = time.time()
        for record in records:
            self.latency_seconds.observe(max(now_s - record.timestamp / 1000, 0.0))
