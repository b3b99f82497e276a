from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.errors import TopicError
from stream.settings import TopicSettings
from stream.topics.admin import Found, differences
from stream.topics.contract import topic_contracts


@given(
    partitions=st.integers(1, 500),
    requests=st.integers(1, 500),
    replicas=st.integers(1, 5),
    prefix=st.sampled_from(["", "shop-", "a.b_"]),
    max_bytes=st.integers(1_024, 50_000_000),
    delta_bytes=st.integers(65_536, 50_000_000),
)
def test_whatever_the_settings_the_contract_holds(
    partitions: int, requests: int, replicas: int, prefix: str, max_bytes: int, delta_bytes: int
) -> None:
    settings = TopicSettings(
        prefix=prefix,
        partitions=partitions,
        request_partitions=requests,
        replication_factor=replicas,
        min_insync_replicas=replicas,
        max_message_bytes=max_bytes,
        deltas_max_message_bytes=delta_bytes,
    )
    by_name = {contract.name.removeprefix(prefix): contract for contract in topic_contracts(settings)}
    assert set(by_name) == {
        *("impressions", "clicks", "examples", "dead-letters"),
        *("score-requests", "scores", "deltas", "snapshots", "scorers"),
    }
    assert {by_name[name].partitions for name in ("impressions", "clicks", "examples")} == {partitions}
    assert {by_name[name].partitions for name in ("score-requests", "scores")} == {requests}
    assert by_name["snapshots"].partitions == by_name["scorers"].partitions == by_name["deltas"].partitions == 1
    compacted = {name for name, contract in by_name.items() if contract.configs["cleanup.policy"] == "compact"}
    assert compacted == {"snapshots", "scorers"}
    for name, contract in by_name.items():
        assert contract.name.startswith(prefix)
        assert contract.replication_factor == replicas
        assert contract.configs["message.timestamp.type"] == "LogAppendTime"
        assert contract.configs["min.insync.replicas"] == str(replicas)
        margin = 65_536 if name in ("examples", "dead-letters") else 0
        limit = delta_bytes if name == "deltas" else max_bytes + margin
        assert contract.configs["max.message.bytes"] == str(limit)
        # Retention would delete what compaction keeps for ever.
        assert ("retention.ms" in contract.configs) == (name not in compacted)
        assert ("retention.bytes" in contract.configs) == (name == "deltas")


def test_more_in_sync_than_there_are() -> None:
    with pytest.raises(TopicError, match=r"topics.min_insync_replicas.*\(2\), found 3: no write.*raise the replication"):
        topic_contracts(TopicSettings(replication_factor=2, min_insync_replicas=3))


def test_differences_each_with_its_cure() -> None:
    contracts = topic_contracts(TopicSettings(partitions=4, request_partitions=2))
    found = {
        contract.name: Found(contract.partitions, contract.replication_factor, dict(contract.configs)) for contract in contracts
    }
    assert differences(contracts, found) == []
    snapshots, scores = found["snapshots"], found["scores"]
    found["snapshots"] = Found(3, 1, {**snapshots.configs, "cleanup.policy": "delete"})
    found["scores"] = Found(5, 2, {key: value for key, value in scores.configs.items() if key != "retention.ms"})
    del found["clicks"]
    problems = {(p.topic, p.what): p for p in differences(contracts, found)}
    assert {key: (p.expected, p.found) for key, p in problems.items()} == {
        ("clicks", "topic"): ("present", "absent"),
        ("scores", "partitions"): ("2", "5"),
        ("scores", "replicas"): ("1", "2"),
        ("scores", "retention.ms"): ("604800000", "unset"),
        ("snapshots", "partitions"): ("1", "3"),
        ("snapshots", "cleanup.policy"): ("compact", "delete"),
    }
    assert problems["clicks", "topic"].cure == "headrace topics create"
    assert problems["scores", "retention.ms"].cure == "headrace topics create --mend"
    assert problems["scores", "partitions"].cure.startswith("HEADRACE_TOPICS__REQUEST_PARTITIONS=5 ")
    assert problems["scores", "replicas"].cure.startswith("HEADRACE_TOPICS__REPLICATION_FACTOR=2 ")
    assert "kafka-topics.sh --delete --topic snapshots" in problems["snapshots", "partitions"].cure


def test_numbers_are_compared_as_numbers() -> None:
    contracts = topic_contracts(TopicSettings())
    found = {
        contract.name: Found(
            contract.partitions, 1, contract.configs | {"min.cleanable.dirty.ratio": "0.10", "max.message.bytes": "7"}
        )
        for contract in contracts
    }
    assert {problem.what for problem in differences(contracts, found)} == {"max.message.bytes"}
