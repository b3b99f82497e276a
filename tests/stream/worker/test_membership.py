"""Who has this worker's place in the group: asked only when the group, or a fence, says that somebody has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from stream.errors import NoAnswer
from stream.settings import KafkaSettings
from stream.worker import membership
from stream.worker.membership import Membership

# member id, instance id, client id, host
OURS, OTHER, STRANGER = ("one-1", "one", "c", "/here"), ("one-2", "one", "c", "/there"), ("two-3", "two", "c", "/there")


class Bench:
    """A membership whose group has the members given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *members: tuple[str, str, str, str], instance_id: str | None = "one"):
        self.asked, self.reachable = 0, True
        self.member_id = "one-1"
        app: Any = SimpleNamespace(consumer=SimpleNamespace(member_id=lambda: self.member_id))
        self.membership = Membership(app, KafkaSettings(), "g", instance_id, setting="join.instance_id")
        self.membership.joined = True

        async def find_coordinator(group: str) -> int:
            self.asked += 1
            return 1

        async def send(request: Any, node: int) -> Any:
            rows = [(*member, b"", b"") for member in members]
            return SimpleNamespace(groups=[(0, "g", "Stable", "consumer", "range", rows, 0)])

        @asynccontextmanager
        async def admin(kafka: KafkaSettings) -> AsyncIterator[Any]:
            if not self.reachable:
                raise NoAnswer("away")
            yield SimpleNamespace(find_coordinator=find_coordinator, _send_request=send)

        monkeypatch.setattr(membership, "admin_client", admin)

    def check(self, **how: bool) -> str | None:
        return asyncio.run(self.membership.check(**how))


def test_put_out_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, STRANGER, OTHER)
    bench.member_id = ""
    said = bench.check()
    assert said == bench.membership.put_out
    assert said is not None
    assert said.startswith(
        "join.instance_id: expected to be the only worker of group g with the instance id 'one', found another"
    )
    assert "client c at /there, member one-2" in said


def test_fenced_before_the_group_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Bench(monkeypatch, OTHER).check(fenced=True) is not None
    # By something else than a worker of this name.
    assert Bench(monkeypatch, OURS, STRANGER).check(fenced=True) is None


def test_what_is_no_reason_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Bench(monkeypatch, OTHER)
    assert known.check() is None
    nameless = Bench(monkeypatch, OTHER, instance_id=None)
    nameless.member_id = ""
    assert nameless.check() is None
    starting = Bench(monkeypatch, OTHER)  # the member of this name is this worker's own former life
    starting.member_id, starting.membership.joined = "", False
    assert starting.check() is None
    assert known.asked + nameless.asked + starting.asked == 0


def test_forgotten_by_a_timeout_and_kafka_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Joining again is right then."""
    expired = Bench(monkeypatch, STRANGER)
    expired.member_id = ""
    assert expired.check() is None
    away = Bench(monkeypatch, OTHER)
    away.member_id, away.reachable = "", False
    assert away.check() is None
    assert away.membership.put_out is None
