"""Reads which track serves, and which ones have a share of the requests beside it."""

from __future__ import annotations

from aiokafka.errors import KafkaError

from deploy.doctor.readings import Challenger
from state.comparison import Comparison
from state.registry import RegistryState
from stream.errors import StreamError
from stream.registry.log import read_registry
from stream.settings import KafkaSettings
from stream.topics.names import TopicNames

__all__ = ["read_challengers", "read_tracks"]


async def read_tracks(kafka: KafkaSettings, main: TopicNames) -> RegistryState:
    """The registry of `main`, which knows all tracks; an empty one where it can't be read, which the reader of it reports."""
    try:
        return await read_registry(kafka, main)
    except (KafkaError, StreamError):
        return RegistryState()


async def read_challengers(kafka: KafkaSettings, main: TopicNames, tracks: RegistryState) -> list[Challenger]:
    """The tracks with a share, and when their trainers counted last."""
    found = []
    for track in tracks.tracks.values():
        if not track.share or track.name == tracks.serving.track:
            continue
        try:
            comparison = (await read_registry(kafka, main.of_track(track.name))).comparison
        except (KafkaError, StreamError):
            comparison = Comparison()
        counts = comparison.of.split("/")[0] == track.share_operation
        found.append(Challenger(track, comparison.at_ms if counts else 0))
    return found
