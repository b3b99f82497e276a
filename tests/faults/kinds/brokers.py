"""Brokers that reject records, die, change roles or throttle, and faults of the network."""

from __future__ import annotations

import asyncio
import os
import signal

from aiokafka import AIOKafkaConsumer
from aiokafka.structs import TopicPartition

from stream.kafka.clients import aiokafka_options
from tests.faults.kinds.base import MAYBE, ask, group_of, kinds, names_of, ready
from tests.faults.network import ADD_OFFSETS, END_TRANSACTION, INIT_PRODUCER, PRODUCE, TRANSACTION_OFFSETS, Link
from tests.faults.play import Kind
from tests.faults.run import POLL_S, Run, happens

__all__ = ["KINDS"]

KINDS: list[Kind] = []
kind = kinds(KINDS)


@kind("the broker refuses a record inside a transaction", crashes=(1, 10))
async def _refused(run: Run) -> None:
    worker = run.worker()
    await run.labels()
    await _max_message_bytes(run, 200)  # less than any batch
    await run.died(worker, 1)
    await run.pause(0.0, 2.0)
    run.over()
    await _max_message_bytes(run, 1_114_124)


async def _max_message_bytes(run: Run, limit: int) -> None:
    topic = names_of(run).examples
    await ask(run, lambda admin: admin.configure(topic, max_message_bytes=limit))


async def _brokers_back(run: Run) -> None:
    run.over()
    await asyncio.to_thread(run.kafka.start)


@kind("the broker killed and started again", cluster="alone", crashes=MAYBE)
async def _broker_killed(run: Run) -> None:
    run.worker()
    await run.labels()
    await run.pause(0.0, 1.0)
    for pid in run.kafka.pids.values():
        os.kill(pid, signal.SIGKILL)
    await run.pause(0.0, 2.0)
    await _brokers_back(run)


@kind("one of three brokers killed", cluster="three", crashes=MAYBE)
async def _one_of_three(run: Run) -> None:
    run.worker()
    await run.labels()
    await run.pause(0.0, 1.0)
    os.kill(run.draw.choice(sorted(run.kafka.pids.values())), signal.SIGKILL)
    run.over()
    await run.pause(3.0, 6.0)
    await asyncio.to_thread(run.kafka.start)


@kind("two of three brokers killed: too few replicas in sync", cluster="three", crashes=MAYBE)
async def _two_of_three(run: Run) -> None:
    run.worker()
    await run.labels()
    await run.pause(0.0, 1.0)
    for pid in run.draw.sample(sorted(run.kafka.pids.values()), 2):
        os.kill(pid, signal.SIGKILL)
    await run.pause(1.0, 4.0)
    await _brokers_back(run)


@kind("partition leaders moved", cluster="three", crashes=MAYBE)
async def _leader_moved(run: Run) -> None:
    """The leader of a partition of `examples` is stopped in order and started again."""
    run.worker()
    await run.labels()
    await run.pause(0.0, 1.0)
    partition = TopicPartition(names_of(run).examples, run.draw.randrange(2))
    async with AIOKafkaConsumer(partition.topic, **aiokafka_options(run.settings.kafka)) as consumer:
        cluster = consumer._client.cluster
        leader = cluster.leader_for_partition(partition)
        os.kill(run.kafka.pids[leader], signal.SIGTERM)
        async with happens("another broker leads"):
            while cluster.leader_for_partition(partition) in (leader, None, -1):
                await asyncio.sleep(POLL_S)
                await consumer._client.force_metadata_update()
    run.over()
    async with happens("the broker ends"):
        while leader in run.kafka.pids:
            await asyncio.sleep(POLL_S)
    await run.pause(1.0, 3.0)
    await asyncio.to_thread(run.kafka.start)


@kind("network cut for longer than the session timeout", static=False, crashes=MAYBE)
async def _cut(run: Run) -> None:
    """The worker is cut off from its broker until the group removes it. Another worker may take over meanwhile."""
    port = int(run.kafka.bootstrap_servers.rsplit(":", 1)[1])
    async with Link(port) as link:
        run.links = {str(port): link.port}
        worker = run.worker("one")
        await run.labels()
        await run.pause(0.0, 1.0)
        members = await _members(run)
        assert members
        link.cut()
        run.links = {}
        another = run.draw.random() < 0.5
        if another:
            run.worker("two")
            run.over()
        async with happens("the group removes the worker"):
            while members & await _members(run):
                await asyncio.sleep(POLL_S)
        await run.pause(0.5, 3.5)
        link.restore()
        if not another:
            run.over()
        await run.pause(0.5, 2.0)
        await run.labels()
        await run.end(worker, signal.SIGTERM)  # its link ends with this block
        if not another:
            run.start(worker)


async def _members(run: Run) -> set[str]:
    return await ask(run, lambda admin: admin.members(group_of(run)))


async def _answers_lost(run: Run, request: int, *, times: int) -> None:
    """The broker carries out a request, and its answer is lost: the connection breaks, or sends no more bytes."""
    run.settings = run.settings.model_copy(
        update={"kafka": run.settings.kafka.model_copy(update={"request_timeout_ms": 4_000})}
    )
    port = int(run.kafka.bootstrap_servers.rsplit(":", 1)[1])
    async with Link(port) as link:
        run.links = {str(port): link.port}
        worker = run.worker()
        await run.labels()
        if request == INIT_PRODUCER:  # only sent at a start
            await run.end(worker)
            link.lose(request, times=times, silently=run.draw.random() < 0.5)
            run.start(worker)
        else:
            await run.pause(0.0, 0.5)
            link.lose(request, times=times, silently=run.draw.random() < 0.5)
        async with happens("an answer is lost"):
            while not link.lost:
                await asyncio.sleep(POLL_S)
        run.over()
        await run.labels(run.draw.randrange(1, 60))
        await ready(worker)
        run.links = {}
        await run.end(worker, signal.SIGTERM)  # its link ends with this block
        run.start(worker)


@kind("the answer to a commit lost", static=True, crashes=MAYBE, join=(("transaction_timeout_ms", 6_000),))
async def _commit_answer_lost(run: Run) -> None:
    await _answers_lost(run, END_TRANSACTION, times=run.draw.randrange(1, 4))


@kind("another answer to a producer lost", static=True, crashes=MAYBE, join=(("transaction_timeout_ms", 6_000),))
async def _producer_answer_lost(run: Run) -> None:
    requests = [PRODUCE, INIT_PRODUCER, ADD_OFFSETS, TRANSACTION_OFFSETS]
    await _answers_lost(run, run.draw.choice(requests), times=run.draw.randrange(1, 3))


async def _coordinator_moved(run: Run, *, of_transactions: bool) -> None:
    """The coordinator is stopped in order and another broker takes over. Later the first broker is started again."""
    run.worker()
    await run.labels()
    await run.pause(0.0, 1.0)
    name = f"{group_of(run)}-{run.draw.randrange(2)}" if of_transactions else group_of(run)
    before = await ask(run, lambda admin: admin.coordinator(name, of_transactions=of_transactions))
    os.kill(run.kafka.pids[before], signal.SIGTERM)
    async with happens("another broker coordinates"):
        while await ask(run, lambda admin: admin.coordinator(name, of_transactions=of_transactions)) == before:
            await asyncio.sleep(POLL_S)
    run.over()
    async with happens("the broker ends"):
        while before in run.kafka.pids:
            await asyncio.sleep(POLL_S)
    await run.pause(0.5, 2.0)
    await asyncio.to_thread(run.kafka.start)


@kind("the group's coordinator moved", cluster="three", crashes=MAYBE)
async def _group_coordinator(run: Run) -> None:
    await _coordinator_moved(run, of_transactions=False)


@kind("the transactions' coordinator moved", cluster="three", crashes=MAYBE)
async def _transactions_coordinator(run: Run) -> None:
    await _coordinator_moved(run, of_transactions=True)


@kind("throttled by quotas")
async def _throttled(run: Run) -> None:
    """For a while, quotas let the join read and write less than what comes in. In half of the runs it is killed meanwhile."""
    client = f"join-{run.folder.name}"
    run.settings = run.settings.model_copy(update={"kafka": run.settings.kafka.model_copy(update={"client_id": client})})
    worker = run.worker()
    await run.labels()
    rate = run.draw.choice([2_000.0, 5_000.0, 10_000.0])
    await ask(run, lambda admin: admin.quota(client, {"producer_byte_rate": rate, "consumer_byte_rate": 4 * rate}))
    await run.pause(2.0, 5.0)
    if run.draw.random() < 0.5:
        await run.end(worker)
        run.start(worker)
    await ask(run, lambda admin: admin.quota(client, {"producer_byte_rate": None, "consumer_byte_rate": None}))
    run.over()
