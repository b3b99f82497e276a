"""The metadata of the join's committed offsets: enough to rebuild a partition's state from the log alone."""

from __future__ import annotations

import secrets

import msgspec

from stream.join.settings_history import Terms

__all__ = ["Progress", "decode_progress", "encode_progress", "new_life"]


class Progress(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is committed together with both sources' offsets, in one transaction.

    The first label of an impression is out exactly when (event time + hold, offset) is below (watermark, cut). The cut is above
    0 only when more impressions of one time are due than one transaction takes.

    A low-water offset is the earliest one that a pending or remembered record still needs. The JSON has short names because a
    broker takes 4,096 bytes of metadata at most. It is JSON so that people can read it with Kafka's own tools.
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
    partitions: int = msgspec.field(name="n", default=0)  # of the topics when this was committed; 0 when it isn't known
    life: str = msgspec.field(name="l", default="")  # drawn at a first start; "" in progress of releases that drew none


def new_life() -> str:
    """A random mark, drawn at a first start and after offsets were reset.

    A local state from before that has another mark.
    """
    return secrets.token_urlsafe(6)


def encode_progress(progress: Progress) -> str:
    return msgspec.json.encode(progress).decode()


def decode_progress(metadata: str) -> Progress:
    """Raises msgspec.DecodeError for metadata that the join has not written."""
    return msgspec.json.decode(metadata.encode(), type=Progress)
