"""One instance id, two workers: the one that was put out notices, says so, and ends after a while.

With an instance id a worker that comes back takes its place in the group at once. So does another worker that was given the
same id by mistake. The group then no longer knows the first one, and aiokafka 0.14 would have it join again under the same id:
the two would put each other out every few seconds, for ever.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from stream.kafka.clients import admin_client, answer
from stream.kafka.requests import GroupMembersRequest
from stream.kafka.transport import RunApp
from stream.settings import KafkaSettings

__all__ = ["PUT_OUT_S", "Membership"]

log = logging.getLogger(__name__)

# How long a worker that was put out waits before it ends. A supervisor starts it again, and then it puts the other one out: so
# long each of the two works at least, and each time both say why.
PUT_OUT_S = 30.0


class Membership:
    """A worker's place in its group, under its instance id.

    Args:
        setting: the setting's name, for the message.
    """

    def __init__(self, app: RunApp, kafka: KafkaSettings, group: str, instance_id: str | None, *, setting: str) -> None:
        self._app, self._kafka, self._group = app, kafka, group
        self._instance_id, self._setting = instance_id, setting
        self.joined = False
        """Set once partitions were assigned: before that, the member of this id is this worker's own former life."""
        self.put_out: str | None = None
        """By whom this worker was put out, in words for people."""

    async def check(self, *, fenced: bool = False) -> str | None:
        """Ask the group when it doesn't know this worker any more, or when a producer of it was fenced.

        What is returned is `put_out`.
        """
        if self._instance_id is None or not self.joined or not (fenced or self._app.consumer.member_id() == ""):
            return None
        try:
            other = await self._other()
        except Exception as error:  # Kafka is away: joining again is the right thing then
            log.warning("could not ask who has instance id %r in group %s: %r", self._instance_id, self._group, error)
            return None
        if other is not None:
            self.put_out = (
                f"{self._setting}: expected to be the only worker of group {self._group} with the instance id "
                f"{self._instance_id!r}, found another one, which has taken this worker's place: {other}. Give each worker an "
                "id of its own (a pod's name), or none."
            )
        return self.put_out

    async def _other(self) -> str | None:
        async with admin_client(self._kafka) as admin:
            node = await answer(self._kafka, admin.find_coordinator(self._group), f"the coordinator of {self._group}")
            described: Any = await answer(
                self._kafka, admin._send_request(GroupMembersRequest(self._group), node), f"members of {self._group}"
            )
        for _, _, _, _, _, members, *_ in described.groups:
            for member_id, instance_id, client_id, host, *_ in members:
                if instance_id == self._instance_id and member_id != self._app.consumer.member_id():
                    return f"client {client_id} at {host}, member {member_id}"
        return None

    async def wait_put_out(self) -> None:
        """Keep the place of a worker that was put out, for a while."""
        log.critical("%s This worker ends in %.0f s.", self.put_out, PUT_OUT_S)
        await asyncio.sleep(PUT_OUT_S)
