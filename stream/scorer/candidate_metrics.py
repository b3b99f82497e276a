"""What a scorer reports about the candidate of a shadow or canary."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from state.canary import Canary
from stream.scorer.trial import Trial

__all__ = ["CandidateMetrics"]


class CandidateMetrics:
    """Registered once in a worker."""

    def __init__(self, prometheus: CollectorRegistry) -> None:
        self._version = Gauge(
            "headrace_scorer_candidate_version",
            "Version of the shadow or canary that runs, -1 for none.",
            registry=prometheus,
        )
        self._ready = Gauge(
            "headrace_scorer_candidate_ready", "1 while the candidate of a shadow or canary takes part.", registry=prometheus
        )
        self._no_room = Gauge(
            "headrace_scorer_candidate_problem",
            "1 while the candidate of a shadow or canary can't take part, such as for want of spare memory.",
            registry=prometheus,
        )
        self._requests = Counter(
            "headrace_scorer_candidate_requests",
            "Requests of the candidate's share: `shadow` scored by it too, `canary` answered by it, `champion` where it could "
            "not score them.",
            ["outcome"],
            registry=prometheus,
        )
        self.failures = Counter(
            "headrace_scorer_candidate_failures",
            "Failures of the candidate: `load` attempts to read it, `score` batches in which it could not score a request.",
            ["what"],
            registry=prometheus,
        )
        self._version.set(-1)

    def wanted(self, canary: Canary | None) -> None:
        """Note the trial that the registry names."""
        self._version.set(-1 if canary is None else canary.version)

    def ready(self, trial: Trial | None, problem: str) -> None:
        """Note whether the candidate takes part."""
        self._ready.set(trial is not None)
        self._no_room.set(bool(problem))

    def scored(self, outcome: str, by_candidate: int, left: int) -> None:
        """Count the requests of the share in one batch: scored by the candidate, and those that it could not score."""
        self._requests.labels(outcome).inc(by_candidate)
        if left:
            self._requests.labels("champion").inc(left)
            self.failures.labels("score").inc()
