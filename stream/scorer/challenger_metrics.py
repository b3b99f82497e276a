"""What a scorer reports about the tracks that score a share of the requests beside the one that serves."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

__all__ = ["ChallengerMetrics"]


class ChallengerMetrics:
    """Registered once in a worker."""

    def __init__(self, prometheus: CollectorRegistry) -> None:
        self._requests = Counter(
            "headrace_scorer_challenger_requests",
            "Requests of a track's share that another track has answered: `scored` by the share's track too, or `missed`.",
            ["track", "outcome"],
            registry=prometheus,
        )
        self._ready = Gauge(
            "headrace_scorer_challenger_ready",
            "1 while a track that has a share of the requests takes part.",
            ["track"],
            registry=prometheus,
        )

    def scored(self, track: str, scored: int, missed: int) -> None:
        """Count the requests of the share in one batch."""
        if scored:
            self._requests.labels(track, "scored").inc(scored)
        if missed:
            self._requests.labels(track, "missed").inc(missed)

    def ready(self, track: str, ready: bool) -> None:
        """Note whether the track takes part."""
        self._ready.labels(track).set(ready)

    def gone(self, track: str) -> None:
        """Note that the track has no share any more."""
        if (track,) in self._ready._metrics:
            self._ready.remove(track)
