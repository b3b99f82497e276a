"""Who leads the trainers: the choice itself, and a membership on the real Kafka."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiokafka.client
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.settings import Settings
from stream.errors import StreamError
from stream.kafka.clients import aiokafka_options
from stream.topics.names import TopicNames
from stream.trainer.election import TAKE_OVER_AGAIN_MS, Claim, chosen
from stream.trainer.leadership import Leadership
from tests.faults.admin import Admin
from tests.faults.network import Link

NOW_MS = 1_700_000_000_000


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        # Without a leader: the newest state, then the newest process.
        ({"a": Claim(version=3), "b": Claim(version=4)}, "b"),
        ({"a": Claim(version=4, started_ms=2), "b": Claim(version=4, started_ms=1)}, "a"),
        ({"a": Claim(), "b": Claim(version=1)}, "b"),
        # A leader stays.
        ({"a": Claim(since=2, version=1), "b": Claim(version=9, started_ms=9)}, "a"),
        # A former leader, if one should still claim to lead, stands back.
        ({"a": Claim(since=2), "b": Claim(since=5)}, "b"),
        # One that asks replaces a leader.
        ({"a": Claim(since=2, version=9), "b": Claim(asks=True, asked_ms=NOW_MS)}, "b"),
        ({"a": Claim(version=9), "b": Claim(asks=True, asked_ms=NOW_MS)}, "b"),
        # Of two that ask, the later one.
        ({"a": Claim(asks=True, asked_ms=NOW_MS), "b": Claim(asks=True, asked_ms=NOW_MS + 1)}, "b"),
        # A leader that has just taken over is safe for a while, and not for longer.
        ({"a": Claim(since=2, asked_ms=NOW_MS - TAKE_OVER_AGAIN_MS + 1), "b": Claim(asks=True, asked_ms=NOW_MS)}, "a"),
        ({"a": Claim(since=2, asked_ms=NOW_MS - TAKE_OVER_AGAIN_MS), "b": Claim(asks=True, asked_ms=NOW_MS)}, "b"),
        # One that asked once and stands by now doesn't count as asking.
        ({"a": Claim(since=2), "b": Claim(asked_ms=NOW_MS)}, "a"),
    ],
)
def test_who_leads(claims, expected):
    assert chosen(claims) == expected


claims = st.builds(
    Claim,
    since=st.integers(0, 3),
    version=st.integers(-1, 3),
    started_ms=st.integers(0, 3),
    asks=st.booleans(),
    asked_ms=st.integers(0, 3),
)


@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), claims, min_size=1))
def test_every_member_would_choose_the_same_one(claims):
    backwards = dict(reversed(claims.items()))
    assert chosen(claims) == chosen(backwards)
    assert chosen(claims) in claims


class Member:
    """A membership without a trainer."""

    def __init__(
        self, settings: Settings, who: str, *, version: int = 0, take_over: bool = False, session_ms: int = 4_000
    ) -> None:
        names = TopicNames.of(settings.topics)
        self.losses: list[BaseException] = []
        self.leadership = Leadership(
            settings.kafka.model_copy(update={"client_id": who}),
            group=f"{names.prefix}leader",
            topic=names.snapshots,
            session_timeout_ms=session_ms,
            who=who,
            loaded=lambda: version,
            take_over=take_over,
            lost=self.losses.append,
        )

    async def __aenter__(self) -> Member:
        await self.leadership.join()
        self._task = asyncio.ensure_future(self.leadership.run())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        await self.leadership.leave()

    async def until(self, leads: bool, leader: str) -> None:
        async with asyncio.timeout(60):
            while not self.leadership.joined or self.leadership.leader_name != leader:
                await asyncio.sleep(0.02)
        assert self.leadership.won.is_set() == leads


@pytest.mark.kafka
async def test_the_next_one_has_the_newest_state_and_everybody_knows_who_leads(topics):
    async with Member(topics, "b", version=2) as second, Member(topics, "c", version=1) as third:
        async with Member(topics, "a", version=9, take_over=True) as first:
            await asyncio.gather(first.until(True, "a"), third.until(False, "a"))
        await asyncio.gather(third.until(False, "b"))
        assert second.losses or second.leadership.won.is_set()


@pytest.mark.kafka
async def test_a_leader_that_is_replaced_is_told(topics):
    async with Member(topics, "a") as first:
        await first.until(True, "a")
        async with Member(topics, "b", take_over=True) as second:
            await second.until(True, "b")
            async with asyncio.timeout(60):
                while not first.losses:
                    await asyncio.sleep(0.02)
            assert "expected to lead, found that b was chosen" in str(first.losses[0])
            async with Member(topics, "c", take_over=True) as third:
                await third.until(False, "b")
                assert third.leadership.refused.is_set()
                assert not second.losses


@pytest.mark.kafka
async def test_a_leader_whom_the_group_has_forgotten_is_told(topics):
    from aiokafka.protocol.group import LeaveGroupRequest

    async with Member(topics, "a") as first:
        await first.until(True, "a")
        coordinator = first.leadership._consumer._coordinator
        await coordinator._send_req(LeaveGroupRequest(first.leadership.group, coordinator.member_id))
        async with asyncio.timeout(60):
            while not first.losses:
                await asyncio.sleep(0.02)
        assert "the group has not heard from this trainer" in str(first.losses[0])


@pytest.fixture
def links(topics, monkeypatch):
    """Makes a link that the connections of the trainer `a` go through."""
    connect = aiokafka.client.create_conn

    @asynccontextmanager
    async def made() -> AsyncIterator[Link]:
        async with Link(int(topics.kafka.bootstrap_servers.rsplit(":", 1)[1])) as link:

            async def connected(host: str, port: int, **options: Any) -> Any:
                return await connect(host, link.port if options["client_id"] == "a" else port, **options)

            monkeypatch.setattr(aiokafka.client, "create_conn", connected)
            yield link

    return made


@pytest.mark.kafka
async def test_a_trainer_leaves_at_once_while_the_group_waits_for_another(topics, links):
    names = TopicNames.of(topics.topics)

    def members() -> set[str]:
        with Admin.of(topics) as admin:
            return admin.members(f"{names.prefix}leader")

    async with links() as link, Member(topics, "a", session_ms=600_000) as first:
        await first.until(True, "a")
        link.cut()
        async with Member(topics, "b", session_ms=600_000) as second:
            async with asyncio.timeout(60):
                while len(await asyncio.to_thread(members)) < 2:
                    await asyncio.sleep(0.02)
            assert not second.leadership.joined
        assert len(await asyncio.to_thread(members)) == 1
        link.restore()


@pytest.mark.kafka
async def test_a_leader_that_was_cut_off_is_told(topics, links):
    async with links() as link, Member(topics, "a") as first:
        await first.until(True, "a")
        link.cut()
        async with Member(topics, "b") as second:
            await second.until(True, "b")
            assert not first.losses
            link.restore()
            async with asyncio.timeout(60):
                while not first.losses:
                    await asyncio.sleep(0.02)
            assert "the group has not heard from this trainer" in str(first.losses[0])
            assert not second.losses


@pytest.mark.kafka
async def test_a_session_time_out_that_the_brokers_reject_is_named(topics):
    async with Member(topics, "a", session_ms=1_000) as first:
        with pytest.raises(StreamError, match=r"trainer.session_timeout_ms 1000: .* they reject 700 ms"):
            async with asyncio.timeout(60):
                await first._task


@pytest.mark.kafka
async def test_another_kind_of_consumer_in_the_group_is_named(topics):
    from aiokafka import AIOKafkaConsumer

    names = TopicNames.of(topics.topics)
    other = AIOKafkaConsumer(names.snapshots, **aiokafka_options(topics.kafka), group_id=f"{names.prefix}leader")
    await other.start()
    try:
        async with asyncio.timeout(60):
            while not other.assignment():
                await asyncio.sleep(0.02)
        async with Member(topics, "a") as first:
            with pytest.raises(StreamError, match="expected trainers only, found consumers of another kind"):
                async with asyncio.timeout(60):
                    await first._task
    finally:
        await other.stop()
