"""What the trainer reports about a shadow or canary."""

from __future__ import annotations

import math

from prometheus_client import CollectorRegistry, Gauge

from state.canary import Canary, Progress

__all__ = ["CanaryMetrics"]


class CanaryMetrics:
    """Registered once in a trainer."""

    def __init__(self, prometheus: CollectorRegistry) -> None:
        self._version = Gauge(
            "headrace_trainer_canary_version", "Version of the shadow or canary that runs, -1 for none.", registry=prometheus
        )
        self._clicks = Gauge(
            "headrace_trainer_canary_clicks",
            "Clicks of the examples that the sides of a shadow or canary have scored.",
            ["side"],
            registry=prometheus,
        )
        self._change = Gauge(
            "headrace_trainer_canary_loss_change",
            "Log loss of the candidate against the champion's, as a part of it: 0.01 is 1 % worse. NaN while it isn't known.",
            registry=prometheus,
        )
        self._error = Gauge(
            "headrace_trainer_canary_loss_error",
            "Standard error of headrace_trainer_canary_loss_change.",
            registry=prometheus,
        )
        self.none()

    def none(self) -> None:
        """Note that no trial runs."""
        self._version.set(-1)
        self._change.set(math.nan)
        self._error.set(math.nan)

    def judged(self, canary: Canary, progress: Progress) -> None:
        """Note what is known of the trial."""
        self._version.set(canary.version)
        self._clicks.labels("candidate").set(progress.candidate.clicks)
        self._clicks.labels("champion").set(progress.champion.clicks)
        self._change.set(math.nan if progress.change is None else progress.change)
        self._error.set(math.nan if progress.error is None else progress.error)
