"""What the trainer reports about its track beside the one that serves."""

from __future__ import annotations

import math

from prometheus_client import CollectorRegistry, Gauge

from state.comparison import Comparison

__all__ = ["ChallengeMetrics"]


class ChallengeMetrics:
    """Registered once in a trainer."""

    def __init__(self, prometheus: CollectorRegistry) -> None:
        self._serves = Gauge(
            "headrace_trainer_track_serves",
            "Whether scorers answer with this trainer's track: 1, or 0.",
            ["track"],
            registry=prometheus,
        )
        self._clicks = Gauge(
            "headrace_trainer_challenge_clicks",
            "Clicks on impressions that both this trainer's track and the one that serves have scored.",
            registry=prometheus,
        )
        self._change = Gauge(
            "headrace_trainer_challenge_loss_change",
            "Log loss of this trainer's track against that of the one that serves, as a part of it: 0.01 is 1 % worse. NaN "
            "while it isn't known.",
            registry=prometheus,
        )
        self._error = Gauge(
            "headrace_trainer_challenge_loss_error",
            "Standard error of headrace_trainer_challenge_loss_change.",
            registry=prometheus,
        )
        self.compared(None)

    def serves(self, track: str, serves: bool) -> None:
        """Note whether the trainer's track serves."""
        self._serves.labels(track).set(serves)

    def compared(self, found: Comparison | None) -> None:
        """Note what is known of the track's share; None without one."""
        self._clicks.set(0 if found is None else found.clicks)
        self._change.set(math.nan if found is None or found.change is None else found.change)
        self._error.set(math.nan if found is None or found.error is None else found.error)
