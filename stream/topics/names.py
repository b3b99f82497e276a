"""The names of the nine topics."""

from __future__ import annotations

from dataclasses import dataclass

from stream.settings import TopicSettings

__all__ = ["TopicNames"]


@dataclass(frozen=True, slots=True)
class TopicNames:
    """Full names of the topics, with `topics.prefix`."""

    prefix: str
    impressions: str
    clicks: str
    examples: str
    score_requests: str
    scores: str
    deltas: str
    snapshots: str
    scorers: str
    dead_letters: str

    @classmethod
    def of(cls, settings: TopicSettings) -> TopicNames:
        prefix = settings.prefix
        return cls(
            prefix=prefix,
            impressions=f"{prefix}impressions",
            clicks=f"{prefix}clicks",
            examples=f"{prefix}examples",
            score_requests=f"{prefix}score-requests",
            scores=f"{prefix}scores",
            deltas=f"{prefix}deltas",
            snapshots=f"{prefix}snapshots",
            scorers=f"{prefix}scorers",
            dead_letters=f"{prefix}dead-letters",
        )
