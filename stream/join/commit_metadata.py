"""What the committed offsets' metadata carries: enough to rebuild a partition's state from the log alone."""

from __future__ import annotations

import secrets

import msgspec

from stream.join.settings_history import Terms

__all__ = ["Progress", "decode_progress", "encode_progress", "new_life"]


class Progress(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Kept with both sources' committed offsets, in the transaction that commits them.

    First labels are out up to (watermark, cut): of an impression exactly when (event time + hold, offset) lies below. The cut
    is above 0 only where more impressions of one time are due than one transaction takes.

    A low-water offset is the earliest one that a pending or remembered record still needs. Names are short because a broker
    takes 4,096 bytes of metadata at most, and people read it with Kafka's own tools.
    """

    watermark_ms: int = msgspec.field(name="w")
    impressions_seen_ms: int = msgspec.field(name="i")
    clicks_seen_ms: int = msgspec.field(name="c")
    impressions_low: int = msgspec.field(name="il")
    clicks_low: int = msgspec.field(name="cl")
    examples_low: int = msgspec.field(name="el")
    cut: int = msgspec.field(name="x", default=0)
    terms: tuple[Terms, ...] = msgspec.field(name="t", default=())  # () in progress that version 0.1.0 committed
    identity: str = msgspec.field(name="o", default="")  # of cluster and topics; "" in progress of version 0.1.0
    partitions: int = msgspec.field(name="n", default=0)  # of the topics when this was committed; 0 where it isn't known
    life: str = msgspec.field(name="l", default="")  # drawn where nothing is committed; "" in progress from before it was drawn


def new_life() -> str:
    """A mark of all that follows from a first start, or from offsets that were reset: a state of before has another."""
    return secrets.token_urlsafe(6)


def encode_progress(progress: Progress) -> str:
    return msgspec.json.encode(progress).decode()


def decode_progress(metadata: str) -> Progress:
    """Raises msgspec.DecodeError for metadata that isn't ours."""
    return msgspec.json.decode(metadata.encode(), type=Progress)
