"""What a trainer checks before it takes an epoch. Taking an epoch ends the trainer that runs.

Everything that could keep the new trainer from starting is checked first, without writing anything: features and model, the
store, the log, the port. Between that check and the epoch the running trainer may announce another version. Then all is checked
again.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace

from aiokafka.structs import TopicPartition

from model.learner import Learner
from model.rows import RowPrecision
from model.schema import FeatureSchema
from model.settings import ModelSettings
from model.table_settings import TableSettings
from state.gate import GateState
from state.registry import RegistryState
from state.rewinds import Rewind
from state.store import SnapshotStore
from stream.kafka.clients import quietly_stopped, started
from stream.kafka.cluster import Cluster
from stream.kafka.read_log import log_consumer, log_spans
from stream.settings import KafkaSettings, TrainerSettings
from stream.topics.names import TopicNames
from stream.trainer.moved import moved
from stream.trainer.start import Start, first_positions, go_on

__all__ = ["Prepared", "gate_state", "place_again", "prepare", "topic_ids"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A learner with the weights that it goes on from, and the offset to read from in each partition.

    positions  offset to read from, by partition
    ends       where the log of each partition ended
    newest     newest version in the registry
    rewind     the rewind that this start obeys, unless one was asked for since; None: nobody sent the trainer back
    """

    learner: Learner
    start: Start
    positions: dict[int, int]
    ends: dict[int, int]
    newest: int
    rewind: Rewind | None = None


async def prepare(
    registry: RegistryState,
    *,
    kafka: KafkaSettings,
    settings: TrainerSettings,
    names: TopicNames,
    cluster: Cluster,
    store: SnapshotStore,
    schema: FeatureSchema,
    model: ModelSettings,
    new_model: bool,
    table: TableSettings | None = None,
    row_precision: RowPrecision = "float32",
    learner: Learner | None = None,
) -> Prepared:
    """Load the version that training goes on from. Writes nothing.

    Args:
        learner: put the weights into this one, which nobody else uses; a new one is made when not given.

    Raises:
        ModelError: no features are named, or the newest version is of another schema or model.
        SnapshotError: the store can't be read, or it and the registry don't know of each other's versions.
        PositionError: the log isn't the one that the newest version was trained on, or it lost examples.
    """
    if learner is None:
        learner = Learner(schema, model, table=table, device=settings.device, row_precision=row_precision)
    registry = registry.copy()  # it may change while the store is read, and it is read in a thread
    rewind = registry.rewinds.pending
    ids = topic_ids(cluster, names)
    if settings.examples_from != "version":
        del ids["examples"]  # a version of another topic is welcome: `moved` gives it other offsets
    start = await asyncio.to_thread(lambda: go_on(learner, registry, store, schema, model, topic_ids=ids, new_model=new_model))
    prepared = Prepared(learner, start, {}, {}, registry.newest, rewind)
    return await place_again(prepared, registry, kafka=kafka, settings=settings, names=names, cluster=cluster)


async def place_again(
    prepared: Prepared,
    registry: RegistryState,
    *,
    kafka: KafkaSettings,
    settings: TrainerSettings,
    names: TopicNames,
    cluster: Cluster,
) -> Prepared:
    """The same weights, with the log's bounds and the registry's newest version as they are now.

    Raises:
        PositionError: the log isn't the one that the version was trained on, or it lost examples.
    """
    beginnings, ends = await _log_bounds(kafka, names.examples, cluster.partitions[names.examples])
    start = replace(prepared.start, newest=registry.newest)
    start = moved(start, settings.examples_from, topic_ids(cluster, names), beginnings, ends)
    positions = first_positions(start, names.examples, beginnings, ends, lost_examples=settings.lost_examples)
    return replace(prepared, start=start, positions=positions, ends=ends, newest=registry.newest)


def gate_state(start: Start, epoch: int) -> GateState:
    """What the gate begins with: a new line for a new model, else the line of the version that training goes on from.

    The version's blocks are restored later, from its trainer state.
    """
    if start.manifest is None:
        return GateState(line=epoch)
    verdict = start.manifest.verdict
    if verdict is None:  # the version is from a release without lines
        return GateState(line=0)
    return GateState(line=verdict.line, clicks=verdict.clicks, negatives=verdict.negatives, passed=verdict.passed)


def topic_ids(cluster: Cluster, names: TopicNames) -> dict[str, str]:
    """Kafka's ids of the two topics that a version belongs to, by their names without the prefix."""
    return {name: cluster.topic_ids[topic] for name, topic in (("examples", names.examples), ("snapshots", names.snapshots))}


async def _log_bounds(kafka: KafkaSettings, topic: str, partitions: int) -> tuple[dict[int, int], dict[int, int]]:
    """First and next offset of every partition's log, as a `read_committed` reader sees it."""
    consumer = await started(kafka, log_consumer(kafka), f"the ends of {topic}")
    try:
        logs = await log_spans(kafka, consumer, [TopicPartition(topic, number) for number in range(partitions)])
    finally:
        await quietly_stopped(consumer.stop)
    return {tp.partition: span.start for tp, span in logs.items()}, {tp.partition: span.end for tp, span in logs.items()}
