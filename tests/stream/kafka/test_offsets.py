"""What a group has committed: an error of the coordinator is never read as "nothing committed"."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.errors import GroupAuthorizationFailedError, TopicAuthorizationFailedError
from aiokafka.structs import OffsetAndMetadata, TopicPartition

from stream.errors import NoAnswer
from stream.kafka import offsets
from stream.kafka.clients import aiokafka_options
from stream.kafka.offsets import committed_offsets
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

PLACE, OTHER = TopicPartition("t", 0), TopicPartition("t", 1)
COMMITTED = OffsetAndMetadata(7, "seven")


def answered(*, group: int = 0, partition: int = 0, version: int = 7) -> Any:
    """Of two partitions, the first has a committed offset; with the error codes given."""
    if version == 3:
        rows = [(0, -1 if partition else 7, "seven", partition), (1, -1, "", 0)]
        return SimpleNamespace(error_code=group, topics=[] if group else [("t", rows)])
    rows = [(0, -1 if partition else 7, 0, "seven", partition, {}), (1, -1, -1, "", 0, {})]
    return SimpleNamespace(error_code=group, topics=[] if group else [("t", rows, {})])


@pytest.fixture
def coordinator(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Answers of the coordinator, in their order; the last one is given again and again."""
    answers: list[Any] = []

    async def find_coordinator(group: str) -> int:
        return 1

    async def send(request: Any, node: int) -> Any:
        return answers.pop(0) if len(answers) > 1 else answers[0]

    @asynccontextmanager
    async def admin(kafka: KafkaSettings) -> AsyncIterator[Any]:
        yield SimpleNamespace(find_coordinator=find_coordinator, _send_request=send)

    monkeypatch.setattr(offsets, "admin_client", admin)
    monkeypatch.setattr(offsets, "RETRY_S", 0.0)
    return answers


def ask() -> dict[TopicPartition, OffsetAndMetadata]:
    return asyncio.run(committed_offsets(KafkaSettings(), "g", [PLACE, OTHER]))


@pytest.mark.parametrize("version", [3, 7])
def test_offsets_and_metadata(coordinator: list[Any], version: int) -> None:
    coordinator.append(answered(version=version))
    assert ask() == {PLACE: COMMITTED}


@pytest.mark.parametrize("code", [14, 15, 16, 88])  # loading, not available, not the coordinator, unstable
@pytest.mark.parametrize("where", ["group", "partition"])
def test_a_passing_error_is_asked_again(coordinator: list[Any], where: str, code: int) -> None:
    coordinator += [answered(**{where: code}), answered(**{where: code}), answered()]
    assert ask() == {PLACE: COMMITTED}
    assert len(coordinator) == 1


@pytest.mark.parametrize(
    ("where", "code", "error"),
    [("group", 30, GroupAuthorizationFailedError), ("partition", 29, TopicAuthorizationFailedError)],
)
def test_any_other_error_is_one(coordinator: list[Any], where: str, code: int, error: type[Exception]) -> None:
    coordinator.append(answered(**{where: code}))
    with pytest.raises(error, match=rf"group g.*error code {code}"):
        ask()


def test_an_error_that_does_not_pass_ends(coordinator: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offsets, "COORDINATOR_S", 0.05)
    coordinator.append(answered(partition=88))
    with pytest.raises(NoAnswer, match=r"committed offsets of group g .*an open transaction is about to move the offset"):
        ask()


@pytest.mark.kafka
def test_an_offset_in_an_open_transaction_is_waited_for(topics):
    """Else the next owner takes the offset before it for the newest, and decides again what was decided."""
    names = TopicNames.of(topics.topics)
    place = TopicPartition(names.impressions, 0)
    group = f"{topics.topics.prefix}g"

    async def check() -> None:
        options = aiokafka_options(topics.kafka)
        async with AIOKafkaProducer(**options, transactional_id=f"{group}-0") as producer:
            for offset in (3, 5):
                await producer.begin_transaction()
                await producer.send_offsets_to_transaction({place: OffsetAndMetadata(offset, f"at {offset}")}, group)
                asking = asyncio.ensure_future(committed_offsets(topics.kafka, group, [place]))
                done, _ = await asyncio.wait([asking], timeout=1.0)
                assert not done
                await producer.commit_transaction()
                assert await asking == {place: OffsetAndMetadata(offset, f"at {offset}")}

    asyncio.run(check())
