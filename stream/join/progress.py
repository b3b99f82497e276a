"""What the committed offsets' metadata carries: enough to rebuild a partition's state from the log alone."""

from __future__ import annotations

import msgspec

__all__ = ["Progress", "decode_progress", "encode_progress"]


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """Kept with both sources' committed offsets, in the transaction that commits them.

    A low-water offset is the earliest one that a pending or remembered record still needs. Names are short because a broker
    takes 4,096 bytes of metadata at most, and people read it with Kafka's own tools.
    """

    watermark_ms: int = msgspec.field(name="w")
    impressions_seen_ms: int = msgspec.field(name="i")
    clicks_seen_ms: int = msgspec.field(name="c")
    impressions_low: int = msgspec.field(name="il")
    clicks_low: int = msgspec.field(name="cl")
    examples_low: int = msgspec.field(name="el")


def encode_progress(progress: Progress) -> str:
    return msgspec.json.encode(progress).decode()


def decode_progress(metadata: str) -> Progress:
    """Raises msgspec.DecodeError for metadata that isn't ours."""
    return msgspec.json.decode(metadata.encode(), type=Progress)
