"""The metrics of a trainer's role: whether it leads, what a standby has loaded, how long a takeover took."""

from __future__ import annotations

import math
import time

from prometheus_client import CollectorRegistry, Counter, Gauge

__all__ = ["StandbyMetrics"]


class StandbyMetrics:
    """Registered once in a trainer's process, before it leads or stands by."""

    def __init__(self, prometheus: CollectorRegistry) -> None:
        self._leading = Gauge(
            "headrace_trainer_leading", "1 while this trainer leads and learns, 0 while it stands by.", registry=prometheus
        )
        self._version = Gauge(
            "headrace_trainer_standby_version",
            "Version whose state a standby has loaded, -1 for none. NaN in the trainer that leads.",
            registry=prometheus,
        )
        self._age = Gauge(
            "headrace_trainer_standby_age_seconds",
            "Age of the version that a standby has loaded. NaN without one, and in the trainer that leads.",
            registry=prometheus,
        )
        self.loads = Counter(
            "headrace_trainer_standby_loads",
            "Versions that a standby loaded or tried to load, by outcome: loaded or failed.",
            ["outcome"],
            registry=prometheus,
        )
        self._takeover = Gauge(
            "headrace_trainer_takeover_seconds",
            "Time from being chosen to lead until the trainer began to learn; 0 before that.",
            registry=prometheus,
        )
        self._catch_up = Gauge(
            "headrace_trainer_catch_up_seconds",
            "Time from being chosen to lead until all examples that were in the log by then were learned; 0 before that.",
            registry=prometheus,
        )
        self._created_at_s = math.nan
        self._version.set(-1)
        self._age.set_function(lambda: time.time() - self._created_at_s)

    def loaded(self, version: int | None, created_at_ms: int) -> None:
        """The state of a version is loaded; None for that of a new model."""
        self._version.set(-1 if version is None else version)
        self._created_at_s = math.nan if version is None else created_at_ms / 1000

    def began(self, after_s: float) -> None:
        """The trainer leads and learns."""
        self._leading.set(1)
        self._takeover.set(after_s)
        self._version.set(math.nan)
        self._created_at_s = math.nan

    def caught_up(self, after_s: float) -> None:
        """Everything that was in the log when the trainer was chosen is learned."""
        self._catch_up.set(after_s)
