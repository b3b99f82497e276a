"""Which of several trainers leads: the one that has partition 0 of `snapshots` in a consumer group of their own.

    trainers ── join, and say what they have loaded ──▶ group ── who leads ──▶ all of them

The group is used for its membership alone: no trainer reads the topic through it, and none commits. Kafka lets go of a member
that has not been heard of for the session time-out, and the group then chooses among the others. A trainer that stops cleanly
leaves the group, so the next one leads at once.

The group says who *may* lead. It can't keep a former leader from writing: that process may be stopped, or cut off from the
brokers. The epoch in the registry and the transactional ids do that (`stream.registry.writer`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import NoReturn

import msgspec
from aiokafka import AIOKafkaConsumer
from aiokafka.abc import ConsumerRebalanceListener
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    InconsistentGroupProtocolError,
    InvalidSessionTimeoutError,
    KafkaError,
)
from aiokafka.protocol.group import LeaveGroupRequest
from aiokafka.structs import TopicPartition

from stream.errors import LostLead, NoAnswer, StreamError
from stream.kafka.clients import STOP_S, aiokafka_options, quietly_stopped, started
from stream.settings import KafkaSettings
from stream.trainer.election import TAKE_OVER_AGAIN_MS, Assignor, Choice, Claim

__all__ = ["Leadership"]

log = logging.getLogger(__name__)

# The group's session time-out as a share of trainer.session_timeout_ms. The rest is for the standby: to hear of it (one
# heartbeat), to join, to take the epoch and to begin. With the default of 10 s these are 7 s and 3 s.
SESSION_SHARE = 0.7
# Heartbeats in one session time-out of the group, and the longest time between two: by a heartbeat a trainer also learns that
# the group chooses anew, because another one has left or asks to take over.
HEARTBEATS, MAX_HEARTBEAT_MS = 10, 1_000
# Longest wait for an answer, in session time-outs of the group. A request to join is answered within one of them, when the
# group has chosen. A leader whose network swallows its requests asks again after this time, and then hears that it no longer
# leads.
REQUEST_SESSIONS = 2
# aiokafka leaves the group when its application hasn't asked for records for this long. `run` asks every POLL_MS; a day
# outlives any event loop that stands still, so that Kafka's session time-out alone decides.
MAX_POLL_MS = 86_400_000
# How often to ask aiokafka for errors of its membership.
POLL_MS = 500
# Wait before a standby joins with a new client, after an error that the old one couldn't recover from.
AGAIN_S = 1.0
# A client that hasn't left the group after this long waits for the group to choose, which takes a session time-out if a member
# has just died. It is then taken out of the group by a request of our own. Leaving takes some milliseconds otherwise.
CHOOSING_S = 0.25


class Leadership(ConsumerRebalanceListener):
    """This process' membership in the group of trainers.

    ```python
    leadership = Leadership(kafka, group="headrace-trainer-leader", topic="snapshots", …)
    await leadership.join()
    task = asyncio.ensure_future(leadership.run())
    await leadership.won.wait()
    …
    await leadership.leave()          # the next one leads at once
    ```

    Args:
        group: name of the group.
        topic: any topic with a partition 0.
        session_timeout_ms: within this time after the leader was last heard of, another one leads.
        who: host and process, for people.
        loaded: gives the newest version whose state is loaded; -1 for none.
        take_over: ask to replace a leader that is there. Asked once.
        lost: called when this process led and no longer may. Must end the process.
    """

    def __init__(
        self,
        kafka: KafkaSettings,
        *,
        group: str,
        topic: str,
        session_timeout_ms: int,
        who: str,
        loaded: Callable[[], int],
        take_over: bool,
        lost: Callable[[BaseException], object],
    ) -> None:
        self.group = group
        self.won = asyncio.Event()
        """Set once this process leads. It never stands by again: losing the lead ends it."""
        self.refused = asyncio.Event()
        """Set when this process asked to take over and may not. It stands by then."""
        self.leader: Claim | None = None
        """What the leader said of itself when the group last chose; None while that isn't known."""
        self.choices = 0
        """How often the group has chosen since this process joined."""
        self.joined = False
        """Whether the group has chosen since this process last joined it."""
        self._kafka, self._partition = kafka, TopicPartition(topic, 0)
        self._session_ms = int(session_timeout_ms * SESSION_SHARE)
        self._session_timeout_ms = session_timeout_ms
        self._who, self._loaded, self._lost = who, loaded, lost
        self._started_ms = _now_ms()
        self._asks, self._asked_ms = take_over, self._started_ms if take_over else 0
        self._since = 0
        self._consumer: AIOKafkaConsumer = None

    async def join(self) -> None:
        """Connect, and begin to join. `won` may be set from now on.

        Raises:
            NoAnswer: Kafka can't be reached.
        """
        options = aiokafka_options(self._kafka)
        consumer = AIOKafkaConsumer(
            **{**options, "request_timeout_ms": REQUEST_SESSIONS * self._session_ms},
            group_id=self.group,
            enable_auto_commit=False,
            session_timeout_ms=self._session_ms,
            heartbeat_interval_ms=min(self._session_ms // HEARTBEATS, MAX_HEARTBEAT_MS),
            max_poll_interval_ms=MAX_POLL_MS,
            partition_assignment_strategy=(Assignor(self._partition, self._claim, self._hear),),
        )
        self._consumer = await started(self._kafka, consumer, f"the group {self.group}")
        # Afterwards, since `start` of a consumer that has subscribed waits until the group has chosen.
        consumer.subscribe([self._partition.topic], listener=self)

    async def run(self) -> None:
        """Look after the membership until cancelled. A standby whose client fails joins with another one.

        Raises:
            StreamError: the broker doesn't let this trainer into the group.
        """
        while True:
            try:
                while True:
                    await self._consumer.getmany(timeout_ms=POLL_MS)
            except KafkaError as error:
                self._require_allowed(error)
                if self._since:
                    self._lose(f"the membership in the group failed ({error!r})")
                log.warning("group %s: joining again in %g s after: %r", self.group, AGAIN_S, error)
            self.joined = False
            await quietly_stopped(self._consumer.stop)
            await self._join_again()

    async def _join_again(self) -> None:
        while True:
            await asyncio.sleep(AGAIN_S)
            try:
                await self.join()
                return
            except (KafkaError, NoAnswer) as error:
                log.warning("group %s: still out of reach: %s", self.group, error)

    async def leave(self) -> None:
        """Leave the group. Takes a few seconds at most, also while the group chooses or Kafka is away.

        To be called once `run` is cancelled.
        """
        self._since = 0
        consumer, self._consumer = self._consumer, None
        if consumer is None:
            return
        coordinator = consumer._coordinator
        member_id = None if coordinator is None else coordinator.member_id
        stopping = asyncio.ensure_future(quietly_stopped(consumer.stop))
        await asyncio.wait([stopping], timeout=CHOOSING_S)
        node = None if coordinator is None else coordinator.coordinator_id
        if not stopping.done() and member_id and node is not None:
            # Over another connection than the request to join, behind which a broker would leave it waiting.
            try:
                async with asyncio.timeout(STOP_S):
                    await consumer._client.send(node, LeaveGroupRequest(self.group, member_id))
            except (KafkaError, TimeoutError) as error:
                log.info("group %s: left without an answer: %r", self.group, error)
        await stopping

    # What aiokafka calls

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """The group chooses anew. A leader that joins again under its member id is still the leader."""
        self.joined = False
        self._require_membership()

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """The group has chosen."""
        if self._consumer is None:
            return  # this trainer is leaving
        self.choices += 1
        self.joined = True
        leads = self._partition in set(assigned)
        refused = self._asks and not leads
        self._asks = False
        if leads and not self._since:
            self._consumer.seek(self._partition, 0)
            self._since = int(self._consumer._coordinator.generation)
            self.won.set()
        elif self._since and not leads:
            self._lose(f"{self.leader_name} was chosen")
        elif not leads:
            log.info("standing by: %s leads", self.leader_name)
        if leads:
            self._consumer.pause(self._partition)
        if refused:
            self.refused.set()
            log.warning("not taking over: %s", self.refusal)

    @property
    def leader_name(self) -> str:
        """Host and process of the leader, for people."""
        return "another trainer" if self.leader is None else self.leader.who

    @property
    def refusal(self) -> str:
        """Why the group didn't let this trainer take over."""
        return (
            f"expected a leader that has not itself taken over in the last {TAKE_OVER_AGAIN_MS // 60_000} minutes, found "
            f"{self.leader_name}, which has. Stop that one, and a standby leads at once; --take-over is for one start only."
        )

    def _claim(self) -> bytes:
        """What this trainer says of itself in the request to join that is about to be sent."""
        self._require_membership()
        claim = Claim(self._who, self._since, self._loaded(), self._started_ms, self._asks, self._asked_ms)
        return msgspec.json.encode(claim)

    def _hear(self, choice: Choice | None) -> None:
        self.leader = None if choice is None else choice.claim

    def _require_membership(self) -> None:
        """A leader whom the group no longer knows has lost the lead: another one may have it."""
        if self._since and not self._consumer._coordinator.member_id:
            self._lose(f"the group has not heard from this trainer for {self._session_ms / 1000:g} s or longer")

    def _lose(self, why: str) -> None:
        self._since = 0
        self._lost(
            LostLead(
                f"group {self.group}: expected to lead, found that {why}. Another trainer leads now or soon; started "
                "again, this one stands by."
            )
        )

    def _require_allowed(self, error: BaseException) -> None:
        if isinstance(error, InvalidSessionTimeoutError):
            _reject(
                f"trainer.session_timeout_ms {self._session_timeout_ms}: expected a time that the brokers take, found that "
                f"they reject {self._session_ms} ms (a share of {SESSION_SHARE:g} of it is the group's session time-out). The "
                "brokers' group.min.session.timeout.ms, 6,000 by default, and group.max.session.timeout.ms are its limits.",
                error,
            )
        if isinstance(error, GroupAuthorizationFailedError):
            _reject(
                f"group {self.group}: expected to be let in, found that the brokers deny it. Allow this user to read the "
                "group.",
                error,
            )
        if isinstance(error, InconsistentGroupProtocolError):
            _reject(
                f"group {self.group}: expected trainers only, found consumers of another kind. Choose another trainer.group, "
                "or stop them.",
                error,
            )


def _reject(message: str, error: BaseException) -> NoReturn:
    raise StreamError(message) from error


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
