from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from deploy.settings import Settings
from stream.errors import NoAnswer, TopicError
from stream.settings import KafkaSettings, TopicSettings
from stream.topic_admin import check_topics, create_topics
from stream.topic_contract import topic_contracts

pytestmark = pytest.mark.kafka


def test_created_topics_are_as_the_contract_says(settings: Settings) -> None:
    before = check_topics(settings.kafka, settings.topics)
    assert [(problem.what, problem.found, problem.cure) for problem in before] == [
        ("topic", "absent", "headrace topics create")
    ] * 8
    made = create_topics(settings.kafka, settings.topics)
    assert made.created == [contract.name for contract in topic_contracts(settings.topics)]
    assert check_topics(settings.kafka, settings.topics) == []


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
