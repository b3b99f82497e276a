"""The names of the nine topics."""

from __future__ import annotations

from dataclasses import dataclass, replace

from state.tracks import MAIN
from stream.settings import TopicSettings

__all__ = ["TopicNames"]


@dataclass(frozen=True, slots=True)
class TopicNames:
    """Full names of the topics, with `topics.prefix`.

    A track other than `main` (`state.tracks`) has topics of its own for `deltas` and `snapshots`.
    """

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
    track: str = MAIN

    @classmethod
    def of(cls, settings: TopicSettings, track: str = MAIN) -> TopicNames:
        prefix = settings.prefix
        names = cls(
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
        return names.of_track(track)

    @property
    def suffix(self) -> str:
        """What distinguishes names of this track from those of `main`: topics, groups and transactional ids."""
        return "" if self.track == MAIN else f"-{self.track}"

    @property
    def chains(self) -> str:
        """What names of this track's chains begin with; empty for `main`, whose chains are named after the model."""
        return "" if self.track == MAIN else self.track

    def of_track(self, track: str) -> TopicNames:
        """The names for another track."""
        if track == self.track:
            return self
        suffix = "" if track == MAIN else f"-{track}"
        return replace(self, track=track, deltas=f"{self.prefix}deltas{suffix}", snapshots=f"{self.prefix}snapshots{suffix}")
