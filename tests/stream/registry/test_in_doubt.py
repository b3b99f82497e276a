"""Whether an operation took effect isn't always known. What is said then is true, and the same may be asked for again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiokafka.errors import KafkaConnectionError

from deploy.settings import Settings
from stream.errors import NoAnswer, Unsettled
from stream.registry import operations as module
from stream.registry import writer as registry
from stream.registry.requests import Goal, RollbackRequest
from stream.registry.writer import RegistryWriter
from stream.topics.names import TopicNames
from tests.stream.registry.test_operations import operations, three_versions
from tests.stream.registry.test_operations import registry as registry_now

pytestmark = pytest.mark.kafka

Commit = Callable[..., Awaitable[None]]


@pytest.fixture
def one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "ATTEMPTS", 1)


def hurt(writer: RegistryWriter, *, committed: bool, away: bool) -> None:
    """The next commit fails, after it took effect or before; from then on Kafka is away, or not."""
    commit, take_over = writer._commit, writer._take_over

    async def failing(*how: Any) -> None:
        if committed:
            await commit(*how)
        writer._commit = commit  # type: ignore[method-assign]
        if away:
            writer._take_over = gone  # type: ignore[method-assign]
        raise registry._CommitFailed from TimeoutError("no answer")

    async def gone() -> None:
        raise KafkaConnectionError("away")

    writer._commit, writer._take_over = failing, take_over  # type: ignore[method-assign]


@pytest.mark.usefixtures("one_attempt")
@pytest.mark.parametrize("committed", [True, False])
def test_what_became_of_the_last_attempt_is_looked_up(topics: Settings, committed: bool) -> None:
    async def run() -> None:
        await three_versions(topics)
        writer = RegistryWriter(topics.kafka, TopicNames.of(topics.topics), who="me")
        hurt(writer, committed=committed, away=False)
        if committed:
            written = await writer.rollback(2, "bad")
            assert (written.outcome.previous, written.outcome.version) == (3, 2)
        else:
            with pytest.raises(NoAnswer, match=r"no answer.* Nothing was changed\.$"):
                await writer.rollback(2, "bad")
        assert (await registry_now(topics)).champion.version == (2 if committed else 3)
        await writer.close()

    asyncio.run(run())


@pytest.mark.usefixtures("one_attempt")
@pytest.mark.parametrize("committed", [True, False])
def test_where_nobody_can_know_that_is_said_with_what_to_run(
    topics: Settings, committed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        await three_versions(topics)
        whole = RegistryWriter.rollback

        async def rollback(self: RegistryWriter, *how: Any) -> Any:
            hurt(self, committed=committed, away=True)
            return await whole(self, *how)

        with monkeypatch.context() as patched:
            patched.setattr(module.RegistryWriter, "rollback", rollback)
            with pytest.raises(Unsettled, match=r"whether it took effect isn't known: .*`headrace snapshot rollback --to 2`"):
                await operations(topics).rollback(RollbackRequest("bad"))
        assert (await registry_now(topics)).champion.version == (2 if committed else 3)
        # What it says does no harm. Without --to, a rollback would now go to version 1 if the first took effect.
        done = await operations(topics).rollback(RollbackRequest("bad", to=2))
        assert (done.version, done.previous, done.held, done.undo is None) == (2, 3, True, committed)
        champion = (await registry_now(topics)).champion
        assert (champion.version, sum(move.how == "rollback" for move in champion.moves)) == (2, 1)

    asyncio.run(run())


def test_a_batch_whose_offset_the_broker_forgot_is_looked_up(topics: Settings) -> None:
    """A retry of a batch that was written already: its position would confirm by any heartbeat."""

    async def run() -> None:
        await three_versions(topics)
        writer = RegistryWriter(topics.kafka, TopicNames.of(topics.topics), who="me")
        await writer.hold("so that it is connected")
        producer, forgot = writer._producer, []
        send = producer.send

        async def forgetful(*what: Any, **how: Any) -> Any:
            future = await send(*what, **how)
            if forgot:
                return future
            forgot.append(True)
            written = await future
            answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            answer.set_result(written._replace(offset=-1, timestamp=-1))
            return answer

        producer.send = forgetful
        written = await writer.rollback(2, "bad")
        assert forgot and written.position > 5 and written.outcome.version == 2
        champion = (await registry_now(topics)).champion
        assert sum(move.how == "rollback" for move in champion.moves) == 1
        await writer.close()

    asyncio.run(run())


def test_the_command_of_a_rewind_names_what_it_leaves_out() -> None:
    from state.changes import Rewinding
    from state.rewinds import SkippedRange

    assert Goal(7, None).command == "headrace snapshot rollback --to 7"
    skipped = (SkippedRange(partition=0, first=5, to=9), SkippedRange(partition=1, first=2, to=3))
    assert Goal(7, Rewinding(skipped)).command == (
        "headrace snapshot rollback --to 7 --rewind-trainer --skip 0:5-9 --skip 1:2-3"
    )
