"""Topics that lose records, are deleted, created again, compacted, or damaged on the broker's disk."""

from __future__ import annotations

import asyncio

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import RecordsToDelete
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from stream.errors import NoAnswer, TopicError
from stream.kafka.clients import admin_client, aiokafka_options
from stream.registry.log import read_registry
from stream.registry.reindex import plan_reindexing, reindex
from tests.faults.snapshots.kinds.base import flipped, kinds
from tests.faults.snapshots.kinds.deltas import at, header_end, write
from tests.faults.snapshots.play import Kind, create_topics
from tests.faults.snapshots.replay import read_topic
from tests.faults.snapshots.run import Run

__all__ = ["KINDS"]

KINDS: list[Kind] = []
kind = kinds(KINDS)


async def delete(run: Run, name: str) -> None:
    """Delete a topic."""
    topic = run.where.prefix + name
    async with admin_client(run.where.kafka) as admin:
        await admin.delete_topics([topic])
        while topic in await admin.list_topics():
            await asyncio.sleep(0.02)


async def configure(run: Run, name: str, **values: object) -> None:
    configs = {key.replace("_", "."): str(value) for key, value in values.items()}
    async with admin_client(run.where.kafka) as admin:
        await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, run.where.prefix + name, configs)])


async def forget(run: Run, keep: int = 0) -> None:
    """Delete the records of `deltas`, as retention does, but for some at the end."""
    partition = TopicPartition(run.where.names.deltas, 0)
    async with admin_client(run.where.kafka) as admin:
        before = -1 if not keep else max(0, run.trainer.writer.position - keep)
        await admin.delete_records({partition: RecordsToDelete(before_offset=before)})
    run.lost_log = True


async def end_trainer(run: Run) -> str:
    """The trainer publishes once more, and ends by the error that it gets, as its process would."""
    found = "published"
    try:
        async with asyncio.timeout(3):
            await run.trainer.delta()
    except (TopicError, NoAnswer, TimeoutError) as error:
        found = type(error).__name__
    await run.trainer.stop()
    return found


@kind("topic deltas deleted and created again")
async def _recreated(run: Run) -> None:
    await run.begin()
    await delete(run, "deltas")
    run.lost_log = True
    run.happened.append(await end_trainer(run))
    run.expect(all(each.served is not None for each in run.scorers), "expected scorers to answer without the topic")
    await create_topics(run.where, "deltas")
    await run.start_trainer()
    await run.trainer.delta(2)


@kind("topic deltas deleted; scorers start without it")
async def _deleted(run: Run) -> None:
    await run.begin(scorers=1)
    await delete(run, "deltas")
    run.lost_log = True
    run.happened.append(await end_trainer(run))
    scorer = await run.start_scorer()
    await run.until(lambda: scorer.served is not None, "a version is served whole")
    await create_topics(run.where, "deltas")
    await run.start_trainer()


@kind("topic deltas created again, and longer than it was")
async def _longer(run: Run) -> None:
    await run.begin()
    await delete(run, "deltas")
    run.lost_log = True
    await run.trainer.stop()
    await create_topics(run.where, "deltas")
    await write(run, [b"filler"] * (run.trainer.writer.position + 20))
    await run.start_trainer()
    await run.trainer.delta(3)
    run.happened.append("created again")


@kind("retention deletes deltas that a scorer has not read")
async def _unread(run: Run) -> None:
    await run.begin()
    await run.trainer.delta(2)
    await run.caught_up()
    for scorer in run.scorers:
        await scorer.stop()
    await run.trainer.delta(3)
    await forget(run, keep=run.drawn.choice([0, 4]))
    run.scorers.clear()
    for _ in range(2):
        await run.start_scorer()
    await run.until(lambda: all(each.served is not None for each in run.scorers), "a version is served")
    await run.trainer.delta(2)
    run.happened.append("deleted")


@kind("retention deletes deltas that a trainer needs to go on")
async def _needed(run: Run) -> None:
    await run.begin()
    await run.trainer.delta(3)
    await run.caught_up()
    await run.trainer.stop()
    await forget(run)
    await run.start_trainer()
    await run.trainer.delta(2)
    run.happened.append("deleted")


@kind("topic snapshots deleted, created again and indexed from the store")
async def _registry(run: Run) -> None:
    await run.begin(versions=2)
    before = await read_registry(run.where.kafka, run.where.names)
    await delete(run, "snapshots")
    await run.trainer.stop()
    await create_topics(run.where, "snapshots")
    state = await read_registry(run.where.kafka, run.where.names)
    plan, manifests = await asyncio.to_thread(plan_reindexing, state, run.trainer.store, [], before.champion.version)
    from stream.registry.writer import RegistryWriter

    writer = RegistryWriter(run.where.kafka, run.where.names, who="operator")
    try:
        await reindex(writer, plan, manifests, "test")
        await writer.resume("test")  # a registry that was lost is held until somebody has looked at it
    finally:
        await writer.close()
    await run.start_trainer()
    run.happened.append("indexed")


@kind("records of a stranger in topic snapshots")
async def _stranger(run: Run) -> None:
    await run.begin()
    producer = AIOKafkaProducer(**aiokafka_options(run.where.kafka))
    await producer.start()
    try:
        records: list[tuple[bytes, bytes]] = [
            (b"version/99999", b"{"),
            (b"alias/champion", b"null"),
            (b"version/x", b"{}"),
            (bytes(run.drawn.randbytes(20)), bytes(run.drawn.randbytes(50))),
        ]
        for key, value in records:
            await producer.send_and_wait(run.where.names.snapshots, value, key, partition=0)
    finally:
        await producer.stop()
    await run.start_scorer()
    run.happened.append("written")


@kind("topic snapshots is compacted")
async def _compacted(run: Run) -> None:
    await run.begin()
    await configure(
        run,
        "snapshots",
        cleanup_policy="compact",
        segment_ms=100,
        min_cleanable_dirty_ratio=0.0,
        delete_retention_ms=0,
        min_compaction_lag_ms=0,
    )
    for _ in range(4):
        await run.version()
        await run.trainer.collect()
        await asyncio.sleep(0.2)

    async def compacted() -> bool:
        # A segment closes when a record comes after it is old enough.
        await run.trainer.registry.tag_good(await run.newest())
        await run.version()
        await run.trainer.collect()
        records = await asyncio.to_thread(read_topic, run.where.servers, run.where.names.snapshots)
        # Each version became champion, by a record of its own.
        return sum(record.key == b"alias/champion" for record in records) < await run.newest() - 2

    await run.until(compacted, "the broker compacts", 40.0)
    run.happened.append("compacted")
    await run.start_scorer()
    await run.trainer.stop()
    await run.start_trainer()


def flip_on_disk(run: Run, value: bytes) -> None:
    """Flip a bit of a record's value where the broker has written it."""
    [log] = [path for path in run.where.broker.rglob("*.log") if path.parent.name == f"{run.where.names.deltas}-0"]
    at_byte = log.read_bytes().index(value) + run.drawn.randrange(len(value))
    with log.open("r+b") as file:
        file.seek(at_byte)
        [found] = file.read(1)
        file.seek(at_byte)
        file.write(bytes([found ^ (1 << run.drawn.randrange(8))]))


@kind("a bit flips on the broker's disk")
async def _disk(run: Run) -> None:
    await run.begin()
    kept: list[bytes] = []

    def keep(pieces: list[bytes]) -> list[bytes]:
        kept[:] = pieces
        return pieces

    for scorer in run.scorers:
        await scorer.stop()
    run.scorers.clear()
    run.trainer.writer.mangle = keep
    await run.trainer.delta()
    await run.trainer.delta(2)
    value = kept[run.drawn.randrange(len(kept))]
    await asyncio.to_thread(flip_on_disk, run, value)
    for _ in range(2):
        await run.start_scorer()
    await run.until(lambda: all(each.served is not None for each in run.scorers), "a version is served")
    await run.refused("checksum", "missing_piece", "gap")


@kind("the topic's limit of a record's size is lowered")
async def _limit(run: Run) -> None:
    await run.begin()
    await configure(run, "deltas", max_message_bytes=1_200)
    await asyncio.sleep(0.1)
    await run.trainer.delta(3)
    await run.caught_up()
    run.expect(run.trainer.writer.limit == 1_200, f"expected a limit of 1,200 bytes, found {run.trainer.writer.limit}")
    run.happened.append("lowered")


@kind("a delta is damaged while a rollback pins a version")
async def _pinned(run: Run) -> None:
    from stream.registry.writer import RegistryWriter

    await run.begin(versions=2)
    writer = RegistryWriter(run.where.kafka, run.where.names, who="operator")
    try:
        await writer.rollback(1, "test")
        await run.until(lambda: all(each.served is not None and each.served.version == 1 for each in run.scorers), "pinned")

        def mangle(pieces: list[bytes]) -> list[bytes]:
            first = header_end(pieces)
            return at(pieces, 0, flipped(pieces[0], run.drawn.randrange(8 * first)))

        run.trainer.writer.mangle = mangle
        await run.trainer.delta(2)
        await run.refused()
        run.expect(
            all(each.served is not None and each.served.version == 1 for each in run.scorers), "expected it to stay pinned"
        )
        await writer.resume("test")
    finally:
        await writer.close()
