"""Two workers with one instance id: the one that was put out of the group notices, says so, and ends after a while.

With an instance id a worker that comes back resumes its membership in the group at once. Another worker that was given the same
id by mistake takes over that membership in the same way. The group then no longer knows the first worker, and aiokafka 0.14
would let it join again under the same id: the two would put each other out every few seconds, for ever.
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

# How long a worker that was put out waits before it ends. Its supervisor then starts it again, and it puts the other one out.
# So each of the two works for at least this long, and each time both say why.
PUT_OUT_S = 30.0


class Membership:
    """Whether a worker is still the member of its group that has its instance id.

    Args:
        instance_id: None when there is nothing to check.
        setting: name of the setting that the id comes from, for the message.
    """

    def __init__(self, app: RunApp, kafka: KafkaSettings, group: str, instance_id: str | None, *, setting: str) -> None:
        self._app, self._kafka, self._group = app, kafka, group
        self._instance_id, self._setting = instance_id, setting
        self.joined = False
        """Set once partitions were assigned. Before that, the member with this id may be this worker's own former process."""
        self.put_out: str | None = None
        """Which worker has put this one out, in words for people."""

    async def check(self, *, fenced: bool = False) -> str | None:
        """Ask the group who has this worker's instance id. Returns `put_out`.

        The group is only asked when it doesn't know this worker any more, or when a producer of this worker was `fenced`.
        """
        if self._instance_id is None or not self.joined or not (fenced or self._app.consumer.member_id() == ""):
            return None
        try:
            other = await self._other()
        except Exception as error:  # Kafka is away: joining again is the right thing to do then
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
        """Log why this worker ends, and wait before it does."""
        log.critical("%s This worker ends in %.0f s.", self.put_out, PUT_OUT_S)
        await asyncio.sleep(PUT_OUT_S)
