"""Counts of a stream while it is sent: for the progress bar, and for what a command prints at its end."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["ReplayStats", "SimulationStats", "StreamStats"]


@dataclass(slots=True)
class StreamStats:
    """Counts so far; safe to read from another thread while the stream is sent."""

    impressions: int = 0
    clicks: int = 0
    event_time_ms: int = -1  # of the last event sent
    watermark_ms: int = -1  # of the watermark records sent at the end
    elapsed_s: float = 0.0

    @property
    def events(self) -> int:
        return self.impressions + self.clicks

    @property
    def events_per_s(self) -> float:
        return self.events / self.elapsed_s if self.elapsed_s > 0 else 0.0


@dataclass(slots=True)
class ReplayStats(StreamStats):
    """Counts of a replay."""

    clicks_beyond_window: int = 0  # of the impressions sent: these clicks come too late to label anything
    requests: int = 0
    answers: int = 0
    answer_ms: list[float] = field(default_factory=list)  # from request to answer, as the replayer saw it


@dataclass(slots=True)
class SimulationStats(StreamStats):
    """Counts of a simulation; `impressions` and `clicks` count each event once, without its duplicates."""

    duplicates: int = 0
    malformed: int = 0

    @property
    def events(self) -> int:
        return self.impressions + self.clicks + self.duplicates + self.malformed
