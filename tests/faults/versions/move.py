"""Moves a system to another cluster, as docs/operations.md says, and counts what was learned on both.

.venv/bin/python -m tests.faults.versions.move
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from kafka import KafkaConsumer, KafkaProducer, OffsetAndMetadata, TopicPartition

from deploy.local_kafka.cluster import LocalKafka
from deploy.settings import LocalKafkaSettings
from tests.faults.code import ROOT
from tests.faults.versions.system import Traffic, Worker, environment, examples_of, headrace, wait_for

KINDS = ("join", "trainer", "scorer")
RUN_S = 20.0


@click.command()
@click.option("--forget", is_flag=True, help="Leave trainer.examples_from out, to see that the trainer says so and ends.")
def main(forget: bool) -> None:
    """Run a system on one local Kafka, move it to another one, and check that each example was learned once.

    The exit code is 1 if an example was lost, doubled, wrong, or learned another number of times than once.
    """
    with tempfile.TemporaryDirectory(prefix="headrace-move-") as name:
        folder = Path(name)
        first, second = (LocalKafka(LocalKafkaSettings(dir=folder / each, heap_mb=384)) for each in ("first", "second"))
        with first, second:
            sys.exit(_move(first, second, folder, forget=forget))


def _move(first: LocalKafka, second: LocalKafka, folder: Path, *, forget: bool) -> bool:
    env = environment(first.bootstrap_servers, folder)
    headrace(ROOT, env, "topics", "create")
    sent = _run(first.bootstrap_servers, env, folder)
    before = _newest(folder)
    learned = examples_of(first.bootstrap_servers)
    click.echo(
        f"first cluster: {len(sent)} impressions {learned.problems(sent)}, version {before['version']} has learned "
        f"{before['examples_seen']} of {learned.count} examples, offsets {before['offsets']}"
    )
    env = environment(second.bootstrap_servers, folder) | {"HEADRACE_STATE_DIR": str(folder / "state-of-second")}
    headrace(ROOT, env, "topics", "create")
    _mirror(first.bootstrap_servers, second.bootstrap_servers, "v-examples")
    copied = examples_of(second.bootstrap_servers).count
    _begin_at_start(second.bootstrap_servers, "v-headrace-join", ("v-impressions", "v-clicks"))
    headrace(ROOT, env, "snapshot", "reindex", "--champion", str(before["version"]), "--reason", "moved")
    headrace(ROOT, env, "snapshot", "resume")
    if not forget:
        env["HEADRACE_TRAINER__EXAMPLES_FROM"] = "end"
    began = time.monotonic()
    moved = _run(second.bootstrap_servers, env, folder, first_number=100_000)
    after, both = _newest(folder), examples_of(second.bootstrap_servers)
    wanted = learned.count + both.count - copied
    click.echo(
        f"second cluster: {copied} examples copied, {len(moved)} impressions {both.problems(moved)}, version "
        f"{after['version']} of chain {after['chain']} has learned {after['examples_seen']} of {wanted} examples, offsets "
        f"{after['offsets']}; {time.monotonic() - began:.0f} s"
    )
    return after["examples_seen"] != wanted or any(learned.problems(sent).values()) or any(both.problems(moved).values())


def _run(servers: str, env: dict[str, str], folder: Path, *, first_number: int = 0) -> dict[str, tuple[float, bool]]:
    """Run all workers under traffic, until every label is learned. Returns the impressions that were sent."""
    workers = [Worker(kind, ROOT, env, folder / f"{kind}.log") for kind in KINDS]
    traffic = Traffic(servers, first_number=first_number)
    try:
        for worker in workers:
            if worker.kind == "scorer":
                traffic.start()  # a scorer of a new model is ready once the trainer has learned something
            if found := worker.until_ready():
                raise click.ClickException(f"{worker.kind}: {found}")
        time.sleep(RUN_S)
        traffic.stop()
        if not wait_for(lambda: not examples_of(servers).problems(traffic.sent)["lost"], 40):
            click.echo("not every impression has a label")
        time.sleep(2)  # the trainer learns the last of them, and writes the last version as it ends
        click.echo(f"   answers: {dict(traffic.answered(0))}, by {traffic.versions(0)[:1]} to {traffic.versions(0)[-1:]}")
        return traffic.sent
    finally:
        traffic.stop()
        for worker in workers:
            worker.stop()


def _newest(folder: Path) -> dict[str, Any]:
    manifests = sorted((folder / "snapshots").glob("v*/manifest.json"))
    return json.loads(manifests[-1].read_bytes())  # type: ignore[no-any-return]


def _begin_at_start(servers: str, group: str, topics: tuple[str, ...]) -> None:
    """Commit offset 0, as `kafka-consumer-groups.sh --reset-offsets --to-earliest` does."""
    consumer = KafkaConsumer(bootstrap_servers=servers.split(","), group_id=group, enable_auto_commit=False)
    try:
        partitions = [TopicPartition(topic, 0) for topic in topics]
        consumer.assign(partitions)
        consumer.commit({partition: OffsetAndMetadata(0, "", -1) for partition in partitions})
    finally:
        consumer.close(autocommit=False)


def _mirror(source: str, target: str, topic: str) -> None:
    """Copy what a `read_committed` reader sees. Offsets differ there, since the markers of transactions aren't records."""
    consumer = KafkaConsumer(bootstrap_servers=source.split(","), isolation_level="read_committed", enable_auto_commit=False)
    producer = KafkaProducer(bootstrap_servers=target.split(","), acks="all")
    try:
        partition = TopicPartition(topic, 0)
        consumer.assign([partition])
        consumer.seek_to_beginning(partition)
        end = consumer.end_offsets([partition])[partition]
        while consumer.position(partition) < end:
            for records in consumer.poll(timeout_ms=200).values():
                for record in records:
                    producer.send(topic, record.value, record.key, list(record.headers), partition=0)
        producer.flush()
    finally:
        consumer.close(autocommit=False)
        producer.close()


if __name__ == "__main__":
    main()
