from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from kafka.admin import KafkaAdminClient

from deploy.settings import Settings
from stream.errors import NoAnswer, TopicError
from stream.kafka.clients import kafka_python_options
from stream.settings import KafkaSettings, TopicSettings
from stream.topics.admin import check_topics, create_topics, find_topics
from stream.topics.contract import topic_contracts
from stream.topics.names import TopicNames

pytestmark = pytest.mark.kafka


def test_created_topics_are_as_the_contract_says(settings: Settings) -> None:
    before = check_topics(settings.kafka, settings.topics)
    assert [(problem.what, problem.found, problem.cure) for problem in before] == [
        ("topic", "absent", "headrace topics create")
    ] * 9
    made = create_topics(settings.kafka, settings.topics)
    assert made.created == [contract.name for contract in topic_contracts(settings.topics)]
    assert check_topics(settings.kafka, settings.topics) == []
    # A challenger has two of its own, and the nine are left alone.
    missing = check_topics(settings.kafka, settings.topics, track="wide")
    own = [f"{settings.topics.prefix}deltas-wide", f"{settings.topics.prefix}snapshots-wide"]
    assert [problem.topic for problem in missing] == own
    assert {problem.cure for problem in missing} == {"headrace topics create --track wide"}
    assert create_topics(settings.kafka, settings.topics, track="wide").created == own
    assert check_topics(settings.kafka, settings.topics, track="wide") == []


def test_topics_of_0_1_0_lack_deltas_and_are_told_so(settings: Settings) -> None:
    """Version 0.1.0 had eight topics."""
    names = TopicNames.of(settings.topics)
    admin = KafkaAdminClient(**kafka_python_options(settings.kafka))
    with contextlib.closing(admin):
        eight = {contract.name: contract for contract in topic_contracts(settings.topics) if contract.name != names.deltas}
        admin.create_topics(
            {
                name: {
                    "num_partitions": contract.partitions,
                    "replication_factor": contract.replication_factor,
                    "configs": contract.configs,
                }
                for name, contract in eight.items()
            }
        )
        admin.wait_for_topics(list(eight), timeout_ms=30_000)
    found = check_topics(settings.kafka, settings.topics, settings.join)
    assert [(each.topic, each.what, each.found, each.cure) for each in found] == [
        (names.deltas, "topic", "absent", "headrace topics create")
    ]
    assert create_topics(settings.kafka, settings.topics, settings.join).created == [names.deltas]
    assert check_topics(settings.kafka, settings.topics, settings.join) == []


def test_create_twice_and_by_two_at_once(settings: Settings) -> None:
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: create_topics(settings.kafka, settings.topics), range(2)))
    assert check_topics(settings.kafka, settings.topics) == []
    again = create_topics(settings.kafka, settings.topics)
    assert (again.created, again.mended) == ([], [])
    assert again.kept == [contract.name for contract in topic_contracts(settings.topics)]
    assert both[0].created or both[1].created


def test_check_says_what_differs_and_mend_mends_it(topics: Settings) -> None:
    wanted = topics.topics.model_copy(update={"retention_ms": 120_000, "partitions": 3})
    found = check_topics(topics.kafka, wanted)
    prefix = topics.topics.prefix
    partitions = {problem.topic: problem for problem in found if problem.what == "partitions"}
    assert set(partitions) == {f"{prefix}{name}" for name in ("impressions", "clicks", "examples", "dead-letters")}
    assert "HEADRACE_TOPICS__PARTITIONS=2" in partitions[f"{prefix}clicks"].cure
    retention = [problem for problem in found if problem.what == "retention.ms"]
    assert len(retention) == 6
    assert {(problem.expected, problem.found) for problem in retention} == {("120000", "604800000")}
    assert len(found) == len(partitions) + len(retention)

    made = create_topics(topics.kafka, wanted)
    assert (made.created, made.mended) == ([], [])
    assert check_topics(topics.kafka, wanted) == found, "create without mend changes nothing that exists"

    assert len(create_topics(topics.kafka, wanted, mend=True).mended) == 6
    assert {problem.what for problem in check_topics(topics.kafka, wanted)} == {"partitions"}


def test_nothing_is_made_beside_topics_of_another_partition_count(settings: Settings) -> None:
    create_topics(settings.kafka, settings.topics)
    names = TopicNames.of(settings.topics)
    removed = KafkaAdminClient(**kafka_python_options(settings.kafka))
    with contextlib.closing(removed):
        removed.delete_topics([names.dead_letters, names.scores])
    while {names.dead_letters, names.scores} & find_topics(settings.kafka, settings.topics).keys():
        time.sleep(0.1)
    wanted = settings.topics.model_copy(update={"partitions": 3})
    with pytest.raises(TopicError) as told:
        create_topics(settings.kafka, wanted)
    assert f"{names.examples} 2, {names.dead_letters} 3, where those that are missing would have topics.partitions" in str(
        told.value
    )
    assert "Nothing was made: HEADRACE_TOPICS__PARTITIONS=2 makes the missing ones" in str(told.value)
    assert {each.topic for each in check_topics(settings.kafka, settings.topics)} == {names.dead_letters, names.scores}
    assert create_topics(settings.kafka, settings.topics).created == [names.dead_letters, names.scores]


def test_unequal_topics_are_found_by_check(settings: Settings) -> None:
    names = TopicNames.of(settings.topics)
    admin = KafkaAdminClient(**kafka_python_options(settings.kafka))
    with contextlib.closing(admin):
        counts = {names.impressions: 2, names.clicks: 2, names.examples: 2, names.dead_letters: 1}
        admin.create_topics({name: {"num_partitions": count, "replication_factor": 1} for name, count in counts.items()})
        admin.wait_for_topics(list(counts), timeout_ms=30_000)
    create_topics(settings.kafka, settings.topics, mend=True)
    found = check_topics(settings.kafka, settings.topics)
    assert [each.topic for each in found if each.expected.startswith("the same number of partitions")] == [", ".join(counts)]


def test_retention_that_the_join_needs(topics: Settings) -> None:
    """One formula: refused before topics are made, and found in those that are there."""
    short = topics.topics.model_copy(update={"retention_ms": 1_264_999})
    with pytest.raises(TopicError, match=r"topics.retention_ms: expected at least 21.1 m \(window \+ 2 × .* Nothing was made"):
        create_topics(topics.kafka, short, topics.join)
    create_topics(topics.kafka, short, mend=True)
    found = check_topics(topics.kafka, short, topics.join)
    assert [(each.what, each.found) for each in found] == [("retention.ms", "21.1 m")] * 3
    enough = short.model_copy(update={"retention_ms": 1_265_000})
    create_topics(topics.kafka, enough, topics.join, mend=True)
    assert check_topics(topics.kafka, enough, topics.join) == []


def test_errors_name_the_setting(settings: Settings) -> None:
    wanted = settings.topics.model_copy(update={"replication_factor": 3})
    with pytest.raises(TopicError, match=r"3 replica\(s\).*InvalidReplicationFactor.*HEADRACE_TOPICS__"):
        create_topics(settings.kafka, wanted)
    with pytest.raises(TopicError, match=r"min_insync_replicas: expected at most .*\(1\), found 2.*Lower it"):
        topic_contracts(settings.topics.model_copy(update={"min_insync_replicas": 2}))


def test_nobody_at_the_address() -> None:
    nobody = KafkaSettings(bootstrap_servers="127.0.0.1:1", connect_timeout_ms=300)
    with pytest.raises(NoAnswer, match=r"127.0.0.1:1 \(PLAINTEXT\): expected an answer.*headrace kafka status"):
        check_topics(nobody, TopicSettings())
