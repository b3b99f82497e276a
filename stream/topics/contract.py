"""The contract of each of the nine topics: partitions, replication, and how Kafka keeps the records."""

from __future__ import annotations

from dataclasses import dataclass, replace

import msgspec

from state.tracks import MAIN
from stream.errors import TopicError
from stream.settings import TopicSettings
from stream.topics.names import TopicNames

__all__ = ["OUTPUT_MARGIN_BYTES", "Difference", "TopicContract", "topic_contracts"]

# An example or a dead letter is an input record with Headrace's headers added. An input record at the limit must still fit.
OUTPUT_MARGIN_BYTES = 65_536

# Kafka compacts closed segments only. A version is announced every few seconds, so a scorer that starts reads an hour of them,
# which is a short read.
SNAPSHOTS_SEGMENT_MS = 3_600_000
# Kafka deletes whole segments, the oldest first. So `deltas` exceeds its retention by at most one segment: 128 MiB, or what the
# trainer writes in ten minutes.
DELTAS_SEGMENT_BYTES = 128 * 1024 * 1024
DELTAS_SEGMENT_MS = 600_000
# Each scorer sends a heartbeat a second, and readers need the last one only. So segments close after a minute.
SCORERS_SEGMENT_MS = 60_000
SCORERS_SEGMENT_BYTES = 4 * 1024 * 1024
# A tombstone must be kept for longer than a reader takes from the first heartbeat to the last, which is seconds.
SCORERS_TOMBSTONE_MS = 600_000
# Share of stale records at which Kafka compacts a log. Its own default is a half.
STALE_RATIO = 0.1


@dataclass(frozen=True, slots=True)
class TopicContract:
    """What one topic must be. `configs` are Kafka's own names and values, as text."""

    name: str
    partitions: int
    replication_factor: int
    configs: dict[str, str]
    partitions_setting: str | None
    """The setting that gives the number of partitions; None where the number is fixed."""
    track: str = MAIN
    """The track that has the topic for itself; `main` for those that all share, too."""


class Difference(msgspec.Struct, frozen=True):
    """One difference of a topic from its contract, and what to do about it."""

    topic: str
    what: str
    expected: str
    found: str
    cure: str


def topic_contracts(settings: TopicSettings, track: str = MAIN) -> tuple[TopicContract, ...]:
    """The nine contracts, in the order in which records flow; then those of the track's own topics.

    Raises:
        TopicError: min_insync_replicas is larger than replication_factor.
    """
    if settings.min_insync_replicas > settings.replication_factor:
        raise TopicError(
            f"topics.min_insync_replicas: expected at most topics.replication_factor ({settings.replication_factor}), found "
            f"{settings.min_insync_replicas}: no write could ever succeed. Lower it, or raise the replication factor."
        )
    names = TopicNames.of(settings)
    deleted = {"cleanup.policy": "delete", "retention.ms": str(settings.retention_ms)}
    compacted = {"cleanup.policy": "compact", "min.cleanable.dirty.ratio": str(STALE_RATIO)}
    deltas = {
        "cleanup.policy": "delete",
        "retention.ms": str(settings.deltas_retention_ms),
        "retention.bytes": str(settings.deltas_retention_bytes),
        "segment.bytes": str(DELTAS_SEGMENT_BYTES),
        "segment.ms": str(DELTAS_SEGMENT_MS),
    }
    snapshots = compacted | {"segment.ms": str(SNAPSHOTS_SEGMENT_MS)}
    scorers = compacted | {
        "segment.ms": str(SCORERS_SEGMENT_MS),
        "segment.bytes": str(SCORERS_SEGMENT_BYTES),
        "delete.retention.ms": str(SCORERS_TOMBSTONE_MS),
    }
    source, larger = settings.max_message_bytes, settings.max_message_bytes + OUTPUT_MARGIN_BYTES
    events, requests = "topics.partitions", "topics.request_partitions"

    def contract(name: str, partitions_setting: str | None, max_bytes: int, kept: dict[str, str]) -> TopicContract:
        partitions = {events: settings.partitions, requests: settings.request_partitions, None: 1}[partitions_setting]
        configs = {
            # The broker's clock at arrival. Event time is in the value, and must not decide when a record is deleted.
            "message.timestamp.type": "LogAppendTime",
            "max.message.bytes": str(max_bytes),
            "min.insync.replicas": str(settings.min_insync_replicas),
        }
        return TopicContract(name, partitions, settings.replication_factor, configs | kept, partitions_setting)

    own = names.of_track(track)
    of_track = (
        ()
        if track == MAIN
        else (
            replace(contract(own.deltas, None, settings.deltas_max_message_bytes, deltas), track=track),
            replace(contract(own.snapshots, None, source, snapshots), track=track),
        )
    )
    return (
        contract(names.impressions, events, source, deleted),
        contract(names.clicks, events, source, deleted),
        contract(names.examples, events, larger, deleted),
        contract(names.dead_letters, events, larger, deleted),
        contract(names.score_requests, requests, source, deleted),
        contract(names.scores, requests, source, deleted),
        contract(names.deltas, None, settings.deltas_max_message_bytes, deltas),
        contract(names.snapshots, None, source, snapshots),
        contract(names.scorers, None, source, scorers),
        *of_track,
    )
