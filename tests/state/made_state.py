"""Options and metadata of a join's local state, for tests."""

from __future__ import annotations

from state.join_state import JoinMeta, StateOptions

__all__ = ["META", "OPTIONS"]


OPTIONS = StateOptions(8)
META = JoinMeta(
    identity="cluster/a/b/c/0",
    impressions_position=7,
    clicks_position=8,
    examples_position=9,
    watermark_ms=-(1 << 62),
    impressions_seen_ms=11,
    clicks_seen_ms=-(1 << 62),
)
