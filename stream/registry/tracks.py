"""A trainer's track in the registry of `main`, which knows all tracks."""

from __future__ import annotations

import logging

from state.tracks import MAIN, Track
from stream.registry.log import read_registry
from stream.registry.writer import RegistryWriter
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

__all__ = ["registered_track"]

log = logging.getLogger(__name__)


async def registered_track(kafka: KafkaSettings, names: TopicNames, who: str) -> Track:
    """The track of these names. It is entered in the registry of `main` when its first trainer starts.

    Raises:
        NoAnswer: Kafka can't be reached.
        TopicError: a topic is missing.
        RegistryError: the name can't be that of a track.
    """
    if names.track == MAIN:
        return Track(name=MAIN)
    main = names.of_track(MAIN)
    known = (await read_registry(kafka, main)).tracks.get(names.track)
    if known is not None:
        return known
    own = await read_registry(kafka, names)
    writer = RegistryWriter(kafka, main, who=who)
    try:
        track = await writer.register_track(names.track, used=max(own.trainer.epoch, max(own.versions, default=0)))
    finally:
        await writer.close()
    log.info("track %s: entered in the registry with number %d", track.name, track.number)
    return track
