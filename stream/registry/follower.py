"""Follows the registry of versions for as long as a worker lives."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from state.registry import RegistryState
from stream.kafka.clients import unreachable
from stream.registry.log import ANSWER, LOOK_MS, RegistryLog
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

__all__ = ["RegistryFollower"]

logger = logging.getLogger(__name__)

# One wait for news while records were read and the end isn't reached: the marker at a transaction's end is no record.
END_MS = 50
# Limit for reading the registry whole. The topic is compacted and read in less than a second; the rest is for a broker that is
# just starting.
START_TIMEOUT_S = 60.0
# Wait before a new connection after an error that the client couldn't recover from.
RECONNECT_S = 1.0


class RegistryFollower:
    """A background task that keeps `state` equal to the registry. No consumer group, committed records only.

    ```python
    follower = RegistryFollower(settings.kafka, names, on_change=lambda state: swap_to(state.champion.version))
    await follower.start()              # has read everything there is
    follower.state.champion.version
    ```

    `on_change` is called with the state at the end of `start`, and whenever new records were read and the end is reached
    again. It runs on the event loop, so it must start work rather than do it. An exception that it raises is logged, and the
    follower goes on.

    Args:
        look_ms: about how often `caught_up_at` moves while there is no news. The less often, the less an idle follower costs.
    """

    def __init__(
        self,
        kafka: KafkaSettings,
        names: TopicNames,
        *,
        on_change: Callable[[RegistryState], object] | None = None,
        look_ms: int = LOOK_MS,
    ) -> None:
        self._kafka = kafka
        self._names = names
        self._on_change, self._look_ms = on_change, look_ms
        self._log = RegistryLog(kafka, names, follow=True)
        self._caught_up_at: float | None = None
        self._reported_to = 0  # the position up to which `on_change` knows everything
        self._at_end = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def state(self) -> RegistryState:
        """The registry as of `position`."""
        return self._log.state

    @property
    def position(self) -> int:
        """The next offset to read: everything below it is in `state`. A heartbeat sends it as `registry_offset`."""
        return self._log.position

    @property
    def caught_up_at(self) -> float | None:
        """When (`time.monotonic()`) the follower was last seen at the log's end. Older than the lease means stale."""
        return self._caught_up_at

    async def start(self) -> None:
        """Read the whole registry, then follow it in the background.

        Raises:
            TopicError: the topic doesn't exist.
            NoAnswer: Kafka can't be reached.
        """
        from aiokafka.errors import KafkaError

        try:
            fresh = await self._opened()
        except (KafkaError, TimeoutError) as error:
            raise unreachable(self._kafka, ANSWER, error) from error
        self._adopt(fresh)
        self._task = asyncio.create_task(self._follow(), name="registry-follower")

    async def read_to_end(self) -> None:
        """Return once `on_change` knows everything that is in the log by now. The caller sets a time limit.

        Raises:
            aiokafka.errors.KafkaError: Kafka can't be reached.
        """
        end = await self._log.end()
        while self._reported_to < end:
            self._at_end.clear()
            await self._at_end.wait()

    async def close(self) -> None:
        """Stop following. `state` stays readable."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        await self._log.close()

    async def _opened(self) -> RegistryLog:
        """A new log that has been read to its end."""
        log = RegistryLog(self._kafka, self._names, follow=True, look_ms=self._look_ms)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await log.open()
        except BaseException:
            await log.close()
            raise
        return log

    async def _follow(self) -> None:
        while True:
            try:
                await self._poll_until_it_fails()
            except Exception:
                logger.warning("registry: lost, connecting again in %g s", RECONNECT_S, exc_info=True)
            await asyncio.sleep(RECONNECT_S)
            try:
                # The old state stays in use until the new one is whole.
                fresh = await self._opened()
            except Exception:
                logger.warning("registry: still out of reach", exc_info=True)
                continue
            await self._log.close()
            self._adopt(fresh)

    async def _poll_until_it_fails(self) -> None:
        news = False
        while True:
            before = self._log.state
            news = await self._log.poll(END_MS if news else self._look_ms) > 0 or news or self._log.state is not before
            at_the_end = self._note_end()
            if news and at_the_end:
                news = False
                self._report()
            elif at_the_end:
                self._note_reported()

    def _adopt(self, log: RegistryLog) -> None:
        """Continue with a log that has just been read to its end."""
        self._log = log
        self._caught_up_at = time.monotonic()
        self._report()

    def _note_end(self) -> bool:
        """Note when the log's end was last seen. Returns whether the follower is at the end now."""
        at = self._log.caught_up_at()
        if at is not None:
            self._caught_up_at = at
        return at is not None

    def _note_reported(self) -> None:
        self._reported_to = self._log.position
        self._at_end.set()

    def _report(self) -> None:
        try:
            if self._on_change is not None:
                self._on_change(self._log.state)
        except Exception:
            logger.exception("registry: the callback failed on a change")
        self._note_reported()
