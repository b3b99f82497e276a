"""Who answers while nobody has a version, and when."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from stream.records.heartbeat import Heartbeat
from stream.scorer import waiting
from stream.scorer.waiting import WaitingRoom, due_ms, is_first
from stream.settings import KafkaSettings, TopicSettings
from stream.topics.names import TopicNames
from tests.stream.scorer.factory import record

NOW = 1_700_000_000_000


def request(arrived_ms: int, value: bytes | None) -> Any:
    found = record(value, b"r")
    found.timestamp = arrived_ms
    return found


@pytest.mark.parametrize(
    ("arrived_ms", "value", "due"),
    [
        (NOW - 200, b'{"request_id":"r"}', NOW + 300),
        (NOW - 200, json.dumps({"request_id": "r", "deadline_ms": NOW + 250}).encode(), NOW + 150),
        (NOW - 200, json.dumps({"request_id": "r", "deadline_ms": NOW + 9_000}).encode(), NOW + 300),
        (NOW - 200, json.dumps({"deadline_ms": None}).encode(), NOW + 300),
        (NOW - 9_000, b"{}", NOW - 8_500),  # a backlog is due at once
        (NOW + 3_600_000, b"{}", NOW + 500),  # the broker's clock is ahead
        *((NOW, value, NOW + 500) for value in (None, b"{", b"\xff", b'{"deadline_ms":"soon"}', b"[" * 9_999)),
    ],
)
def test_a_request_waits_for_a_bounded_time_and_not_beyond_its_deadline(arrived_ms: int, value: bytes | None, due: int) -> None:
    assert due_ms(request(arrived_ms, value), NOW, 500) == due


def test_one_of_those_without_a_version_answers_and_none_beside_one_that_has_one() -> None:
    def beat(worker: str, version: int) -> Heartbeat:
        return Heartbeat(worker=worker, version=version, since_ms=0, host="h", registry_offset=0, at_ms=0)

    both = [beat("a", -1), beat("b", -1)]
    assert [is_first(worker, both) for worker in ("a", "b")] == [True, False]
    assert not is_first("a", [*both, beat("c", 1)]) and not is_first("a", [beat("b", -1)]) and not is_first("a", [])


def test_a_broker_that_never_answers_is_asked_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    asyncio.run(_ask_a_broker_that_never_answers(monkeypatch))
    assert "the brokers don't answer: TimeoutError()" in caplog.text


async def _ask_a_broker_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scorers:
        def __init__(self, *_: Any, **how: Any) -> None: ...

        async def __aenter__(self) -> Scorers:
            return self

        async def __aexit__(self, *_: object) -> None: ...

        async def live(self) -> list[Heartbeat]:
            return [Heartbeat(worker="a", version=-1, since_ms=0, host="h", registry_offset=0, at_ms=0)]

    rounds: list[int] = []

    async def hang() -> None:
        rounds.append(len(rounds))
        await asyncio.Event().wait()

    async def refuse(records: list[Any]) -> None: ...

    monkeypatch.setattr(waiting, "HeartbeatReader", Scorers)
    monkeypatch.setattr(waiting, "ROUND_S", 0.02)
    monkeypatch.setattr(waiting, "LOOK_S", 0.0)
    names = TopicNames.of(TopicSettings())
    room = WaitingRoom(KafkaSettings(), names, group="g", partitions=1, worker="a", patience_ms=1, refuse=refuse)
    monkeypatch.setattr(room, "_round", hang)
    running = asyncio.ensure_future(room.run())
    async with asyncio.timeout(20):
        while len(rounds) < 3:
            await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.wait([running])
